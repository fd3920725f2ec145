"""Measures what each codec costs each layer of a model, and finds the cheapest that it can bear."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmesh.backends.models.codec_check import BLOCK_FORMAT, CodecCheck, Loss
from kvmesh.backends.models.spec import base_codec
from kvmesh.integration.codec_plan import MAX_ROUNDS, Assignment, Layer, LayerCost, search
from kvmesh.integration.kl import REFERENCE, Divergence, KlBench, Progress, Stored, layer_bytes

CANDIDATES = ("k8v8", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2")
DEFAULT_BUDGET = 0.02  # nats; by Pinsker's inequality, probabilities move by at most 10 % in sum


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """What to look for. codecs: that a layer may have besides fp16, which loses nothing.

    budget_nats: of the mean KL against fp16. prompts: names the sequences, for the record.
    """

    model: str
    prompts: str
    codecs: tuple[str, ...] = CANDIDATES
    budget_nats: float = DEFAULT_BUDGET

    def num_measurements(self, num_layers: int) -> int:
        """At most, the reference included."""
        return 2 + len(self.codecs) * (1 + num_layers) + MAX_ROUNDS


def check_model(
    bench: KlBench, plan: CheckPlan, num_layers: int, progress: Progress | None = None
) -> CodecCheck:
    """Measures every codec in all layers and in each alone, then whole assignments.

    Raises BackendError if the model cannot be opened, ValueError if no assignment fits.
    """
    names = (REFERENCE, *(codec for codec in plan.codecs if codec != REFERENCE))
    whole = {codec: bench.measure(Stored(codec), progress) for codec in names}
    alone = {
        codec: [
            bench.measure(Stored(REFERENCE, only(codec, layer, num_layers)), progress)
            for layer in range(num_layers)
        ]
        for codec in names[1:]
    }
    uniform = {codec: found.loss() for codec, found in whole.items()}

    def measure(assignment: Assignment) -> Loss:
        return bench.measure(Stored(REFERENCE, assignment), progress).loss()

    known = {(codec,) * num_layers: loss for codec, loss in uniform.items()}
    layers = layer_costs(whole, alone)
    assignment, loss = search(layers, plan.budget_nats, measure, known)
    return CodecCheck(
        model=plan.model,
        fingerprint=bench.fingerprint.hex(),
        block_format=BLOCK_FORMAT,
        prompts=plan.prompts,
        positions=bench.num_positions,
        budget_nats=plan.budget_nats,
        codec=base_codec(REFERENCE, assignment),
        layer_codecs=assignment,
        chosen=loss,
        uniform=uniform,
        layers={codec: tuple(cost[codec].kl for cost in layers) for codec in names},
    )


def only(codec: str, layer: int, num_layers: int) -> Assignment:
    """`codec` in one layer, fp16 in all others."""
    return tuple(codec if index == layer else REFERENCE for index in range(num_layers))


def layer_costs(
    whole: Mapping[str, Divergence], alone: Mapping[str, Sequence[Divergence]]
) -> list[Layer]:
    """whole: a codec in all layers, which has the bytes. alone: in each layer, which has the KL."""
    sizes = {codec: layer_bytes(found.layout) for codec, found in whole.items()}
    return [
        {
            codec: LayerCost(
                sizes[codec][layer],
                float(alone[codec][layer].kl.mean()) if codec in alone else 0.0,
            )
            for codec in whole
        }
        for layer in range(len(sizes[REFERENCE]))
    ]
