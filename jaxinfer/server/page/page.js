// The chat page. What a model says becomes text of elements, never HTML.
const $ = (id) => document.getElementById(id);
const fields = document.querySelector("#settings form").elements;
let messages = []; // as the API has them, with what is shown beside: {role, content, ...}
let running = null; // AbortController of the answer that comes
let kind = "generation"; // what the model does
const HINTS = {
  embedding: "A text to embed; or a query, and below it, a line each, the texts to compare it with.",
  reranker: "A query, and below it, a line each, the texts that may answer it.",
  classifier: "Texts to classify, a line each.",
};

const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

const headers = () => ({
  "Content-Type": "application/json",
  ...(fields.key.value ? { Authorization: `Bearer ${fields.key.value}` } : {}),
});

async function loadModels() {
  const answer = await fetch("/v1/models", { headers: headers() });
  const body = await answer.json();
  if (!answer.ok) return say(body.error.message);
  $("model").replaceChildren(...body.data.map((model) => element("option", { textContent: model.id })));
  const info = await (await fetch("/info", { headers: headers() })).json();
  [kind] = Object.keys(info.model_type);
  $("text").placeholder = HINTS[kind] ?? $("text").placeholder;
  say("");
}

const say = (text) => { $("status").textContent = text; };

// Server-sent events of a response, as objects.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// What one chunk adds to an assistant's message.
export function add(message, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) message.usage = chunk.usage;
  for (const choice of chunk.choices ?? []) {
    message.content += choice.delta.content ?? "";
    message.reasoning += choice.delta.reasoning ?? "";
    message.calls.push(...(choice.delta.tool_calls ?? []));
    message.tokens.push(...(choice.logprobs?.content ?? []));
    message.finish = choice.finish_reason ?? message.finish;
  }
}

function request() {
  const system = fields.system.value ? [{ role: "system", content: fields.system.value }] : [];
  const said = messages.map(({ role, content, calls }) => ({
    role,
    content,
    ...(calls?.length ? { tool_calls: calls.map(({ index, ...call }) => call) } : {}),
  }));
  const body = { model: $("model").value, messages: [...system, ...said], stream: true };
  body.stream_options = { include_usage: true };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if (fields[name].value !== "") body[name] = Number(fields[name].value);
  }
  if (fields.logprobs.checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  if (fields.tools.value.trim()) body.tools = JSON.parse(fields.tools.value);
  return body;
}

async function post(path, body) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

// What a model that generates nothing makes of lines: classes of each, a vector, or how well each answers the first.
async function judged(kind, lines) {
  const [query, ...documents] = lines;
  if (kind === "classifier") {
    const classes = await (await post("/predict", { inputs: lines.map((line) => [line]) })).json();
    const listed = (all) => all.map(({ label, score }) => `${(100 * score).toFixed(1)}% ${label}`).join(", ");
    return lines.map((line, i) => `${line}\n    ${listed(classes[i])}`).join("\n");
  }
  if (documents.length === 0 && kind === "embedding") {
    const { embedding } = (await (await post("/v1/embeddings", { input: query })).json()).data[0];
    return `${embedding.length} dimensions: ${embedding.slice(0, 8).map((x) => x.toFixed(3)).join(", ")}, ...`;
  }
  const { results } = await (await post("/rerank", { query, documents })).json();
  return results.map(({ index, relevance_score }) => `${relevance_score.toFixed(4)} ${documents[index]}`).join("\n");
}

async function stream(message) {
  const response = await post("/v1/chat/completions", request());
  messages.push(message);
  for await (const chunk of events(response.body)) {
    add(message, chunk);
    show();
  }
}

async function answer() {
  running = new AbortController();
  const message = { role: "assistant", content: "", reasoning: "", calls: [], tokens: [] };
  $("stop").hidden = false;
  const start = performance.now();
  try {
    if (kind === "generation") await stream(message);
    else {
      message.content = await judged(kind, messages.at(-1).content.split("\n").filter((line) => line.trim()));
      messages.push(message);
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = String(error.message);
    if (messages.at(-1) !== message) messages.push(message);
  }
  message.seconds = (performance.now() - start) / 1000;
  running = null;
  $("stop").hidden = true;
  show();
}

function figures({ usage, seconds, finish }) {
  if (!usage) return finish ?? "";
  const { prompt_tokens: prompt, completion_tokens: count, prompt_tokens_details: details } = usage;
  return `${prompt} prompt (${details?.cached_tokens ?? 0} cached), ${count} new, ${(count / seconds).toFixed(1)} tokens/s, ${finish}`;
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;

// The content, token by token: reasoning before it and what ends it are tokens, too.
export function cut(content, tokens) {
  const start = tokens.map((token) => token.token).join("").lastIndexOf(content);
  if (!content || start < 0) return [[content, null]];
  const pieces = [];
  let at = -start;
  for (const token of tokens) {
    const text = content.slice(Math.max(at, 0), Math.max(at + token.token.length, 0));
    at += token.token.length;
    if (text) pieces.push([text, token]);
  }
  return pieces;
}

function spoken({ content, tokens }) {
  return cut(content, tokens ?? []).map(([textContent, token]) => (token === null ? textContent : element("span", {
    textContent,
    title: [percent(token.logprob), ...token.top_logprobs.map((o) => `${percent(o.logprob)} ${JSON.stringify(o.token)}`)].join("\n"),
  })));
}

function shown(message, index) {
  const card = element("article", { className: message.role });
  if (message.reasoning) {
    card.append(element("details", { open: !message.content && index === messages.length - 1 },
      element("summary", { textContent: "Reasoning" }), element("div", { className: "text", textContent: message.reasoning })));
  }
  card.append(element("div", { className: "text" }, ...spoken(message)));
  for (const call of message.calls ?? []) {
    card.append(element("pre", { textContent: `${call.function.name} ${call.function.arguments}` }));
  }
  if (message.error) card.append(element("div", { className: "error", textContent: message.error }));
  const button = (text, onclick) => element("button", { type: "button", textContent: text, onclick, disabled: running !== null });
  const edit = () => { $("text").value = message.content; messages.length = index; show(); $("text").focus(); };
  const retry = () => { messages.length = index; answer(); };
  card.append(element("nav", {}, message.role === "user" ? button("Edit", edit) : button("Retry", retry),
    element("span", { textContent: message.role === "assistant" && message.seconds ? figures(message) : "" })));
  return card;
}

function show() {
  const atEnd = window.innerHeight + window.scrollY >= document.body.scrollHeight - 40;
  $("chat").replaceChildren(...messages.map(shown));
  if (atEnd) window.scrollTo(0, document.body.scrollHeight);
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const content = $("text").value.trim();
  if (!content || running) return;
  messages.push({ role: "user", content });
  $("text").value = "";
  answer();
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
$("stop").onclick = () => running?.abort();
$("new").onclick = () => { running?.abort(); messages = []; show(); $("text").focus(); };
fields.key.onchange = loadModels;
document.querySelector("#settings form").onsubmit = (event) => event.preventDefault();
loadModels().catch((error) => say(error.message));
