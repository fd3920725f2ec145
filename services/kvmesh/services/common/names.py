"""Names of spans and attributes: the one table.

gen_ai.* follow the OpenTelemetry GenAI semantic conventions (development status); kvmesh.* are
ours, for what the conventions have no word for.
"""

# Spans
SPAN_REQUEST = "chat"  # with the model: "chat mini", as the conventions name an inference span
SPAN_TOKENIZE = "tokenize"
SPAN_ENCODE = "tokenizer encode"
SPAN_ROUTE = "route"
SPAN_WORKER = "worker run"
SPAN_QUEUE = "queue"
SPAN_KV_FETCH = "kv fetch"
SPAN_KV_GET = "kvcache get"
SPAN_KV_PUT = "kv put"
SPAN_KV_STORE = "kvcache put"
SPAN_TAIL_FETCH = "tail fetch"
SPAN_PREFILL = "prefill"
SPAN_SEAL = "seal"
SPAN_HANDOVER = "hand-over"
SPAN_DECODE = "decode"
SPAN_DETOKENIZE = "detokenize"
SPAN_MIGRATE = "migrate"
SPAN_DROPPED = "spans dropped"  # tells the receiver what its sender lost; never stored

# gen_ai attributes
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
TEMPERATURE = "gen_ai.request.temperature"
MAX_TOKENS = "gen_ai.request.max_tokens"
SEED = "gen_ai.request.seed"
TIME_TO_FIRST = "gen_ai.response.time_to_first_chunk"  # seconds

CHOICES = "gen_ai.request.choice.count"

# http, rpc and error attributes, of the edges' spans
HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
HTTP_STATUS = "http.response.status_code"
ERROR_TYPE = "error.type"
RPC_SYSTEM = "rpc.system"
RPC_SERVICE = "rpc.service"
RPC_METHOD = "rpc.method"

# ours
CLOCK = "kvmesh.clock"  # measured or simulated
MEMBER = "kvmesh.member"
SERVICE = "kvmesh.service"
REQUEST_ID = "kvmesh.request.id"
WORKER = "kvmesh.worker"
BLOCKS = "kvmesh.kv.blocks"
BYTES = "kvmesh.kv.bytes"
HIT_TOKENS = "kvmesh.kv.hit_tokens"
CORRUPT = "kvmesh.kv.corrupt_blocks"
STEPS = "kvmesh.decode.steps"
TOKENS = "kvmesh.tokens"
SEAL_SECONDS = "kvmesh.seal.seconds"
AGGREGATED = "kvmesh.aggregated"  # a sum of many short pieces, shown as one span
CANDIDATES = "kvmesh.route.candidates"  # JSON
REASON = "kvmesh.route.reason"
PREDICTED = "kvmesh.route.predicted_s"
MIGRATIONS = "kvmesh.migrations"
TENANT = "kvmesh.tenant"
RAW_BYTES = "kvmesh.kv.raw_bytes"  # the same blocks as fp16, for comparison with `BYTES`
LONGEST_STEP = "kvmesh.decode.longest_s"  # longest wait for one token since the mark before
DROPPED = "kvmesh.spans.dropped"
COST_USD = "kvmesh.cost.usd"
COST_DEVICE = "kvmesh.cost.device_s"
COST_KIND = "kvmesh.cost.kind"  # measured, simulated, or mixed: then there are no sums
COST_PRICE = "kvmesh.cost.price_usd_h"  # of one device
COST_DEVICES = "kvmesh.cost.devices"  # JSON: each stay on a worker
SIMULATED_FIRST = "kvmesh.simulated.ttft_s"
SIMULATED_DURATION = "kvmesh.simulated.duration_s"
COST_SPLIT = tuple(f"kvmesh.cost.{part}_usd" for part in ("queue", "prefill", "decode", "kv"))
