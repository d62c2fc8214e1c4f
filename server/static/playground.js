// The prompt box: sends what is in it, shows the answer as it comes, and keeps the times of the last requests.

import { stream } from "/page/api.js";

// Rows of the table of requests.
const KEPT = 8;

const EXAMPLES = {
  completion: 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self):\n',
  chat: "Write a function that reads a file line by line.",
};

const ENDINGS = { stop: "end of text", length: "token limit", stopped: "you", failed: "error" };

const $ = (id) => document.getElementById(id);
const time = (milliseconds) => (Number.isFinite(milliseconds) ? `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms` : "–");

/** When one request was sent and its tokens came, in milliseconds. */
class Timing {
  constructor() {
    this.sent = performance.now();
    this.chunks = 0;
  }

  chunk() {
    this.last = performance.now();
    this.first ??= this.last;
    this.chunks += 1;
  }

  /** Figures for `tokens` tokens; NaN where there were too few to tell. */
  figures(tokens) {
    const between = (this.last - this.first) / (tokens - 1);
    return { ttft: this.first - this.sent, itl: tokens > 1 ? between : NaN, rate: (1000 * tokens) / (this.last - this.sent) };
  }
}

export class Playground {
  #model = null;
  #abort = null;
  #turns = [];
  #onKeyNeeded;

  /** `onKeyNeeded` is called when a request is answered 401. */
  constructor(onKeyNeeded) {
    this.#onKeyNeeded = onKeyNeeded;
    $("prompt").value = EXAMPLES[this.#kind];
    $("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    for (const radio of document.getElementsByName("kind")) radio.addEventListener("change", () => this.#changeKind());
    $("stop").addEventListener("click", () => this.#abort?.abort());
    $("clear").addEventListener("click", () => this.#clear());
    addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("send").disabled) $("form").requestSubmit();
      if (event.key === "Escape") this.#abort?.abort();
    });
  }

  /** Requests go to `model`; null while none is served. */
  serve(model) {
    this.#model = model;
    $("send").disabled = model === null;
  }

  get #kind() {
    return $("form").elements.kind.value;
  }

  async #send() {
    if (this.#model === null || this.#abort) return;
    const kind = this.#kind;
    const prompt = $("prompt").value;
    const body = { model: this.#model, max_tokens: $("max-tokens").valueAsNumber, temperature: $("temperature").valueAsNumber };
    const answer = this.#beginAnswer(kind, prompt);
    this.#abort = new AbortController();
    this.#setBusy(true);
    const timing = new Timing();
    const sentAt = new Date();
    let ending = "failed";
    let usage = null;
    let problem = "";
    try {
      const events =
        kind === "chat"
          ? stream("/v1/chat/completions", { ...body, messages: this.#turns }, this.#abort.signal)
          : stream("/v1/completions", { ...body, prompt }, this.#abort.signal);
      for await (const event of events) {
        const choice = event.choices[0];
        const text = choice?.text ?? choice?.delta.content;
        if (text) {
          timing.chunk();
          answer.append(text);
        }
        ending = choice?.finish_reason ?? ending;
        usage = event.usage ?? usage;
      }
    } catch (error) {
      if (error.name === "AbortError") ending = "stopped";
      else if (error.status === 401) this.#onKeyNeeded();
      else problem = error.retryAfter ? `${error.message} Try again in ${error.retryAfter} s.` : error.message;
    }
    answer.flush();
    this.#abort = null;
    this.#setBusy(false);
    if (kind === "chat") this.#turns.push({ role: "assistant", content: answer.node.data });
    const tokens = usage?.completion_tokens ?? timing.chunks;
    const figures = timing.figures(tokens);
    const summary = `${tokens} tokens, the first after ${time(figures.ttft)}, then one every ${time(figures.itl)}.`;
    $("outcome").textContent = problem || (tokens > 0 ? summary : "No token came.");
    $("outcome").classList.toggle("error", problem !== "");
    addRow(sentAt, kind, usage, tokens, figures, ENDINGS[ending] ?? ending);
  }

  /** Show what is asked; returns what the answer goes to. */
  #beginAnswer(kind, prompt) {
    const asked = Object.assign(document.createElement("span"), { className: "asked", textContent: prompt });
    const output = $("output");
    const answer = new Answer(output);
    if (kind === "chat") {
      this.#turns.push({ role: "user", content: prompt });
      const turn = Object.assign(document.createElement("p"), { className: "turn" });
      turn.append(answer.node);
      output.append(asked, turn);
      $("prompt").value = "";
    } else {
      output.replaceChildren(asked, answer.node);
    }
    output.scrollTop = output.scrollHeight;
    $("outcome").textContent = "";
    return answer;
  }

  #setBusy(busy) {
    $("output").ariaBusy = String(busy);
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    // Focus stays with the button that was pressed, whichever of the two it is now.
    if (document.activeElement === document.body) $(busy ? "stop" : "send").focus();
    $("clear").hidden = busy || this.#kind !== "chat";
  }

  #changeKind() {
    this.#abort?.abort();
    this.#clear();
    $("prompt").value = EXAMPLES[this.#kind];
  }

  #clear() {
    this.#turns = [];
    $("output").replaceChildren();
    $("outcome").textContent = "";
    $("clear").hidden = true;
  }
}

/** The text node of an answer; what comes within one frame is laid out once. */
class Answer {
  #waiting = "";

  constructor(output) {
    this.output = output;
    this.node = document.createTextNode("");
  }

  append(text) {
    if (this.#waiting === "") requestAnimationFrame(() => this.flush());
    this.#waiting += text;
  }

  flush() {
    const { output } = this;
    const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 24;
    this.node.appendData(this.#waiting);
    this.#waiting = "";
    if (atEnd) output.scrollTop = output.scrollHeight;
  }
}

function addRow(sentAt, kind, usage, tokens, { ttft, itl, rate }, ending) {
  const cells = [
    sentAt.toLocaleTimeString("en-GB"),
    kind,
    usage?.prompt_tokens ?? "–",
    tokens,
    time(ttft),
    time(itl),
    Number.isFinite(rate) ? rate.toFixed(0) : "–",
    ending,
  ];
  const tr = document.createElement("tr");
  tr.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  $("requests").querySelector(".none")?.remove();
  $("requests").prepend(tr);
  while ($("requests").children.length > KEPT) $("requests").lastElementChild.remove();
}
