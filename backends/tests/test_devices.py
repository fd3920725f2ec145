"""Device files: the package's are complete and tagged, a user's are checked."""

import tomllib
from pathlib import Path

import pytest

from kvmesh.backends.devices import device_names, library, load_device
from kvmesh.backends.errors import DeviceError

BUILT_IN = {"h100", "h200", "b200", "gb200", "b300", "gb300", "rubin", "lpu-v1", "lp30"}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_every_built_in_number_has_a_tag_and_a_source():
    assert set(device_names()) == BUILT_IN
    for name in BUILT_IN:
        figures = dict(load_device(name).figures())
        assert len(figures) >= 7
        assert all(figure.tag in "MDCXR" and figure.source for figure in figures.values())
        assert load_device(name).name == name


def test_datasheet_values():
    rubin, gb300 = load_device("rubin"), load_device("gb300")
    assert rubin.peak["nvfp4"].value == 35e15
    assert rubin.memory.bandwidth_bytes_s.value == 22e12
    assert gb300.memory.bytes.value == 284_208 * 2**20
    assert gb300.domain == 72 and load_device("b300").domain == 8
    assert gb300.price is not None and gb300.price.per_hour["july-2026"].value == 2.36


def test_what_is_taken_from_another_device_says_so():
    rubin = dict(load_device("rubin").figures())
    assert rubin["efficiency.gemm.nvfp4.compute"].taken_from == "gb300"
    assert rubin["efficiency.gemm.nvfp4.compute"].value == 0.31
    assert rubin["efficiency.all_to_all.link"].taken_from == "gb200"
    assert rubin["efficiency.scale"].fitted_on == "C15"
    assert rubin["efficiency.scale"].taken_from is None
    fitted = {path for path, figure in rubin.items() if figure.fitted_on == "C15"}
    assert fitted == {"efficiency.scale"}


def test_a_user_file_extends_a_device(tmp_path: Path):
    text = 'extends = "h100"\n[memory]\nbytes = 96e9\n[price.per_hour]\nmine = 0.9\n'
    write(tmp_path, "h100-96", text)
    device = load_device("h100-96", tmp_path)
    assert device.name == "h100-96"
    assert device.memory.bytes.value == 96e9
    assert device.memory.bytes.tag == "U" and "h100-96.toml" in device.memory.bytes.source
    assert device.memory.bandwidth_bytes_s == load_device("h100").memory.bandwidth_bytes_s
    assert device.price is not None and device.price.per_hour["mine"].value == 0.9
    assert load_device(str(tmp_path / "h100-96.toml")) == device
    assert "h100-96" in device_names(tmp_path)


def test_a_user_file_overrides_a_device_of_its_name(tmp_path: Path):
    write(tmp_path, "h100", 'extends = "h100"\n[power]\ntgp_w = 350\n')
    power = load_device("h100", tmp_path).power.tgp_w
    assert power is not None and power.value == 350
    other = load_device("h100").power.tgp_w
    assert other is not None and other.value == 700


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[memory]\nbandwidth_bytes_s = -1", r"memory.bandwidth_bytes_s is -1, must be greater"),
        ("[efficiency.gemm.bf16]\ncompute = 1.2", r"compute is 1.2, must be .* at most 1"),
        ("[scale_up]\ndomain = 2.5", r"scale_up.domain is 2.5, must be a whole number"),
        ("[memory]\nbytes = nan", r"memory.bytes.value is nan"),
        ("[memory]\nbytes = 'many'", r"memory.bytes is 'many'"),
        ("[memory]\nsize = 1", r"memory.size is not a field"),
        ("[price]\ndefault = 'mine'", r"default is 'mine', must be one of: hyperscaler"),
        ("[take]\n'efficiency.none' = 'h200'", r"device h200 has no efficiency.none"),
        ("memory = ", r"is not TOML"),
    ],
)
def test_a_wrong_value_is_named_with_its_limit(tmp_path: Path, text: str, message: str):
    write(tmp_path, "mine", f'extends = "h100"\n{text}\n')
    with pytest.raises(DeviceError, match=message) as found:
        load_device("mine", tmp_path)
    assert "mine.toml" in str(found.value)


def test_unknown_devices_and_circles(tmp_path: Path):
    with pytest.raises(DeviceError, match=r"no device is named 'gb30'; did you mean 'gb300'"):
        load_device("gb30")
    write(tmp_path, "a", 'extends = "b"\n')
    write(tmp_path, "b", 'extends = "a"\n')
    with pytest.raises(DeviceError, match=r"from itself: a -> b -> a"):
        load_device("a", tmp_path)
    write(tmp_path, "c", 'title = "nothing else"\n')
    with pytest.raises(DeviceError, match=r"peak is missing"):
        load_device("c", tmp_path)
    with pytest.raises(DeviceError, match=r"not a folder"):
        device_names(tmp_path / "none")


def test_what_a_built_in_device_takes_is_what_it_has():
    """A table of its own under the same name would win, and the file say what is not so."""
    for name in BUILT_IN:
        raw = tomllib.loads((Path(library.__file__).parent / f"{name}.toml").read_text())
        figures = dict(load_device(name).figures())
        for field in raw.get("take", {}):
            taken = [f for path, f in figures.items() if path.startswith(f"{field}.")]
            assert any(figure.taken_from for figure in taken), f"{name}: take.{field}"
