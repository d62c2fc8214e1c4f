// Reads /metrics, the same text Prometheus scrapes: this page has no figures of its own.

const SAMPLE = /^([\w:]+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Samples of the Prometheus text format: a Map from name to [{labels, value}]. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const [, name, labels = "", value] = SAMPLE.exec(line) ?? [];
    if (name === undefined) continue;
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels: Object.fromEntries([...labels.matchAll(LABEL)].map((m) => [m[1], m[2]])), value: Number(value) });
  }
  return samples;
}

/** What the page keeps of one scrape. All counts are cumulative; `time` is in seconds. */
export class Reading {
  constructor(text, time) {
    const samples = parse(text);
    const total = (name) => (samples.get(name) ?? []).reduce((sum, { value }) => sum + value, 0);
    this.time = time;
    this.tokens = total("vllm:generation_tokens_total");
    this.running = total("vllm:num_requests_running");
    this.waiting = total("vllm:num_requests_waiting") + total("sparse_requests_queued");
    this.ttft = { sum: total("vllm:time_to_first_token_seconds_sum"), count: total("vllm:time_to_first_token_seconds_count") };
    this.itl = { sum: total("vllm:inter_token_latency_seconds_sum"), count: total("vllm:inter_token_latency_seconds_count") };
    this.kernel = samples.get("sparse_kernel_info")?.[0].labels;
    this.layers = new Map();
    for (const { labels, value } of samples.get("sparse_ffn_neurons") ?? []) {
      this.layers.set(labels.layer, { neurons: value, rows: 0, active: 0, union: 0, steps: 0, sparseSteps: 0, sparseRows: 0 });
    }
    for (const { labels, value } of samples.get("sparse_ffn_expected_density") ?? []) {
      if (this.layers.has(labels.layer)) this.layers.get(labels.layer).checkpoint = value;
    }
    const counts = { rows: "rows", active_neurons: "active", union_neurons: "union", steps: "steps" };
    for (const [name, field] of Object.entries(counts)) {
      for (const { labels, value } of samples.get(`sparse_ffn_${name}_total`) ?? []) {
        const layer = this.layers.get(labels.layer);
        layer[field] += value;
        if (labels.path === "sparse" && field === "steps") layer.sparseSteps += value;
        if (labels.path === "sparse" && field === "rows") layer.sparseRows += value;
      }
    }
  }

  /** True if this is a later reading of the same process, so that differences between both mean something. */
  follows(earlier) {
    const layers = [...this.layers].every(([name, { rows }]) => rows >= (earlier.layers.get(name)?.rows ?? Infinity));
    return layers && this.tokens >= earlier.tokens && this.ttft.count >= earlier.ttft.count;
  }
}

/** What happened between two readings. Shares are null where nothing was computed. */
export class Interval {
  constructor(from, to) {
    this.from = from.time;
    this.to = to.time;
    this.tokens = to.tokens - from.tokens;
    this.tokensPerSecond = this.tokens / (to.time - from.time);
    this.answers = to.ttft.count - from.ttft.count;
    this.ttft = share(to.ttft.sum - from.ttft.sum, this.answers);
    this.itl = share(to.itl.sum - from.itl.sum, to.itl.count - from.itl.count);
    this.layers = [...to.layers].map(([name, layer]) => layerBetween(name, from.layers.get(name), layer));
    const sum = (field) => this.layers.reduce((total, layer) => total + layer[field], 0);
    this.rows = sum("rows");
    this.density = share(sum("active"), sum("cells"));
    this.sparseSteps = share(sum("sparse"), sum("steps"));
    this.sparseRows = share(sum("sparseRows"), this.rows);
  }
}

function layerBetween(name, from, to) {
  const rows = to.rows - from.rows;
  const steps = to.steps - from.steps;
  const active = to.active - from.active;
  const sparse = to.sparseSteps - from.sparseSteps;
  return {
    name,
    rows,
    steps,
    active,
    sparse,
    sparseRows: to.sparseRows - from.sparseRows,
    cells: rows * to.neurons,
    checkpoint: to.checkpoint,
    density: share(active, rows * to.neurons),
    union: share(to.union - from.union, steps * to.neurons),
    sparseSteps: share(sparse, steps),
  };
}

const share = (part, whole) => (whole > 0 ? part / whole : null);
