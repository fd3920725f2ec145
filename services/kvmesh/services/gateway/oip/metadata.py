"""What the protocol says of a server and its model. Pure."""

from importlib.metadata import version

from kvmesh.oip import inference_pb2 as pb
from kvmesh.services.gateway.oip.answers import VERSION
from kvmesh.services.gateway.oip.tensors import INPUTS, OUTPUTS
from kvmesh.v1 import inference_pb2

PLATFORM = "kvmesh"
EXTENSIONS = ("model_configuration", "parameters")
ANY = -1
_TYPES = {"BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL, "FP32": pb.TYPE_FP32,
          "UINT32": pb.TYPE_UINT32}  # fmt: skip


def server_metadata() -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(
        name=PLATFORM, version=version("kvmesh"), extensions=EXTENSIONS
    )


def model_metadata(model: inference_pb2.ModelInfo) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[tensor(name=name, datatype=kind, shape=[1]) for name, kind in INPUTS.items()],
        outputs=[
            tensor(name=name, datatype=kind, shape=[_size(name)]) for name, kind in OUTPUTS.items()
        ],
    )


def model_config(model: inference_pb2.ModelInfo) -> pb.ModelConfig:
    """decoupled: with `stream`, a request has a response for each piece of its text."""
    block = model.format
    parameters = {
        "max_context": model.max_context,
        "vocab_size": model.vocab_size,
        "kv_codec": block.codec,
        "kv_block_tokens": block.block_size,
        "kv_block_bytes": block.block_bytes,
        "fingerprint": block.fingerprint.hex(),
    }
    return pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=0,
        input=[
            pb.ModelInput(
                name=name, data_type=_TYPES[kind], dims=[1], optional=name != "text_input"
            )
            for name, kind in INPUTS.items()
        ],
        output=[
            pb.ModelOutput(name=name, data_type=_TYPES[kind], dims=[_size(name)])
            for name, kind in OUTPUTS.items()
        ],
        parameters={
            name: pb.ModelParameter(string_value=str(value)) for name, value in parameters.items()
        },
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
    )


def _size(name: str) -> int:
    """One element for each choice, but the prompt is one."""
    return 1 if name == "num_input_tokens" else ANY
