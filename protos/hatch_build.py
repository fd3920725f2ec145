"""Generate protobuf and gRPC stubs next to the .proto files.

Runs as a hatchling build hook (wheel and editable), and by hand:
`python protos/hatch_build.py`.
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
OUTPUTS = ("python_out=", "grpc_python_out=", "mypy_out=", "mypy_grpc_out=only_async:")


def generate() -> None:
    """Write `*_pb2.py`, `*_pb2_grpc.py` and their type stubs for every .proto under ROOT.

    Raises RuntimeError when protoc refuses a file.
    """
    import grpc_tools
    from grpc_tools import protoc

    # protoc finds the mypy plugin on PATH, and an environment that was not activated is not there.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.proto"))
    outputs = [f"--{out}{ROOT}" for out in OUTPUTS]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *sources]):
        raise RuntimeError("protoc failed, see its message above")


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, outside a build
    pass
else:

    class StubHook(BuildHookInterface):  # type: ignore[type-arg]
        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            generate()


if __name__ == "__main__":
    generate()
