"""Names of metrics and of their labels: the one table. Prometheus writes '_' for '.'.

gen_ai.* follow the OpenTelemetry GenAI semantic conventions (development status), kvmesh.* are
ours, and vllm:* are the names of vLLM that routers in front of model servers look for.
"""

# gen_ai: of each request, recorded by the router when it has ended
REQUEST_DURATION = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"
TOKEN_USAGE = "gen_ai.client.token.usage"

# router
ROUTER_ACTIVE = "kvmesh.router.requests.active"
ROUTER_REJECTED = "kvmesh.router.requests.rejected"
ROUTER_DECISIONS = "kvmesh.router.decisions"
ROUTER_MIGRATIONS = "kvmesh.router.migrations"
ROUTER_INDEX_BYTES = "kvmesh.router.index.size"
ROUTER_INDEX_BLOCKS = "kvmesh.router.index.blocks"
ROUTER_MEMBERS = "kvmesh.router.members"
CACHE_QUERY_TOKENS = "kvmesh.cache.query.tokens"
CACHE_HIT_TOKENS = "kvmesh.cache.hit.tokens"
COST = "kvmesh.cost"
DEVICE_TIME = "kvmesh.device.time"

# worker
WORKER_RUNNING = "kvmesh.worker.sequences.running"
WORKER_WAITING = "kvmesh.worker.sequences.waiting"
WORKER_PENDING = "kvmesh.worker.prefill.pending"
WORKER_STEPS = "kvmesh.worker.steps"
WORKER_BATCHED = "kvmesh.worker.steps.sequences"  # by steps: the mean batch size
WORKER_BATCH = "kvmesh.worker.batch.size"
WORKER_GENERATED = "kvmesh.worker.tokens.generated"
WORKER_PREFILLED = "kvmesh.worker.tokens.prefilled"
WORKER_PREEMPTIONS = "kvmesh.worker.preemptions"
POOL_BLOCKS = "kvmesh.pool.blocks"
POOL_FREE = "kvmesh.pool.blocks.free"

# worker and kvcache
MOVED_BYTES = "kvmesh.kv.moved"
CHECKSUM_FAILURES = "kvmesh.kv.checksum_failures"

# kvcache
SHARD_BLOCKS = "kvmesh.kvcache.blocks"
SHARD_USED = "kvmesh.kvcache.used"
SHARD_ON_DEVICE = "kvmesh.kvcache.on_device"
SHARD_BUDGET = "kvmesh.kvcache.budget"
SHARD_HITS = "kvmesh.kvcache.hits"
SHARD_MISSES = "kvmesh.kvcache.misses"
SHARD_PUTS = "kvmesh.kvcache.puts"
SHARD_EVICTIONS = "kvmesh.kvcache.evictions"
SHARD_LEASES = "kvmesh.kvcache.leases"

# tokenizer
TOKENIZER_OPEN = "kvmesh.tokenizer.requests.open"
TOKENIZER_PROMPTS = "kvmesh.tokenizer.prompts"
TOKENIZER_TOKENS = "kvmesh.tokenizer.tokens"

# gateway; http.* follow the OpenTelemetry HTTP semantic conventions
HTTP_DURATION = "http.server.request.duration"
HTTP_ACTIVE = "http.server.active_requests"
HTTP_FIRST = "kvmesh.gateway.first_byte"
HTTP_CONNECTIONS = "kvmesh.gateway.connections"

# router and gateway: tenants. There are as many as the key file has, shown up to a limit.
TENANT_REQUESTS = "kvmesh.tenant.requests"
TENANT_TOKENS = "kvmesh.tenant.tokens"
TENANT_ACTIVE = "kvmesh.tenant.requests.active"
TENANT_REFUSED = "kvmesh.tenant.requests.refused"
KEY_FAILURES = "kvmesh.keys.failures"

# An instrument's name takes no colon, so each has a view that gives it its real name.
VLLM_WAITING = "vllm.num_requests_waiting"
VLLM_RUNNING = "vllm.num_requests_running"
VLLM_CACHE_USAGE = "vllm.kv_cache_usage_perc"
VLLM_CACHE_CONFIG = "vllm.cache_config_info"
VLLM_CACHE_QUERIES = "vllm.prefix_cache_queries"
VLLM_CACHE_HITS = "vllm.prefix_cache_hits"
VLLM = {
    name: name.replace(".", ":")
    for name in (
        VLLM_WAITING,
        VLLM_RUNNING,
        VLLM_CACHE_USAGE,
        VLLM_CACHE_CONFIG,
        VLLM_CACHE_QUERIES,
        VLLM_CACHE_HITS,
    )
}

# Labels. Each takes few values: members, configured models, classes of errors.
ERROR_TYPE = "error.type"
TOKEN_TYPE = "gen_ai.token.type"  # input or output
ROUTE_KIND = "kvmesh.route.kind"  # single, handover, or none
DIRECTION = "kvmesh.kv.direction"
LIMIT_KIND = "kvmesh.tenant.limit"  # requests, tokens or concurrency
MEMBER_KIND = "kvmesh.member.kind"
MODEL_NAME = "model_name"  # vLLM's own label
