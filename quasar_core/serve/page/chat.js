"use strict";
// A chat over the server's own API. Each chunk of a stream tells, in `quasar.tokens`, who wrote each of its tokens.

const find = (id) => document.getElementById(id);
let messages = []; // of this conversation; another one has a list of its own
let running = null; // the AbortController of the answer that is being written
let agreement = null;
let known = false; // whether the server has told what it serves

const PROMISES = {
  exact: "exact: the text is the full-precision model's own; the low-bit copy only proposes.",
  full: "full: the full-precision model decides each token.",
  quantized: "quantized: the low-bit copy decides each token, so the text is the copy's.",
};

function headers() {
  const key = find("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function say(text) {
  find("status").textContent = text;
}

async function begin() {
  const reply = await fetch("v1/models", { headers: headers() });
  if (reply.status === 401) {
    find("enter").hidden = false;
    say(find("key").value ? "This is not the server's API key." : "This server asks for an API key.");
    find("key").focus();
    return;
  }
  const model = (await reply.json()).data[0];
  agreement = model.agreement;
  find("model").textContent = `${model.id}, context of ${model.max_model_len} tokens`;
  fill(find("verify"), model.modes, model.verify);
  fill(find("draft"), model.drafts, model.draft);
  known = true;
  promise();
  say("");
}

function start() {
  return begin().catch((error) => say(`The server does not answer: ${error.message}`));
}

function fill(select, names, chosen) {
  select.replaceChildren(...names.map((name) => new Option(name, name, name === chosen, name === chosen)));
}

function promise() {
  const mode = find("verify").value;
  const measured = mode === "quantized" && agreement !== null ? ` It agreed with the model on ${(100 * agreement).toFixed(1)} % of measured tokens.` : "";
  const drawn = Number(find("temperature").value) > 0 && mode === "exact" ? " Above temperature 0, drawn from exactly its distribution." : "";
  find("promise").textContent = (PROMISES[mode] || "") + measured + drawn;
}

function add(role, name) {
  const article = document.createElement("article");
  article.className = role;
  const title = document.createElement("h2");
  title.textContent = name;
  const thought = document.createElement("div");
  thought.className = "text thought";
  thought.hidden = true;
  const text = document.createElement("div");
  text.className = "text";
  const figures = document.createElement("p");
  figures.className = "figures";
  article.append(title, thought, text, figures);
  find("conversation").append(article);
  return { article, thought, text, figures };
}

// The prompt's pass is that of whoever decides; where no copy checks, a pass's own token is the model's.
function colour(by, verify) {
  const decider = verify === "quantized" ? "bonus" : "target";
  return by === "prompt" || (by === "bonus" && verify === "full") ? decider : by;
}

function write(into, text, tokens, verify) {
  // Tokens colour the text where they make up all of it; else, as at the end of thinking, it stays plain.
  const whole = tokens && tokens.map((token) => token.text).join("") === text;
  for (const piece of whole ? tokens : [{ text }]) {
    const indent = indentOf(into, piece.text);
    if (indent) blank(into, indent);
    if (indent.length < piece.text.length) paint(into, piece.text.slice(indent.length), piece.by ? colour(piece.by, verify) : "plain");
  }
}

// The white space that a text begins with at a line's beginning or over its end: lines under it would say nothing.
function indentOf(into, text) {
  const last = into.lastChild;
  const begins = !last || isBlank(last) || /\n[ \t]*$/.test(last.textContent);
  return text.match(begins ? /^\s*/ : /^(\s*\n\s*)?/)[0];
}

function isBlank(node) {
  return node !== null && node.nodeType === Node.TEXT_NODE;
}

function blank(into, text) {
  if (isBlank(into.lastChild)) into.lastChild.appendData(text);
  else into.append(text);
}

function paint(into, text, by) {
  const last = into.lastChild;
  if (last && last.className === by) last.textContent += text;
  else {
    const span = document.createElement("span");
    span.className = by;
    span.textContent = text;
    into.append(span);
  }
}

function take(chunk, answer) {
  if (chunk.error) throw new Error(chunk.error.message);
  const choice = chunk.choices[0];
  if (!choice) return;
  const { content, reasoning_content: thought } = choice.delta;
  const log = find("conversation");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 48; // who scrolled up reads, and stays there
  if (thought) {
    answer.thought.hidden = false;
    write(answer.thought, thought, null);
  }
  if (content) {
    answer.whole += content;
    write(answer.text, content, chunk.quasar && chunk.quasar.tokens, answer.verify);
  }
  if (choice.finish_reason) answer.figures.textContent = figures(chunk, choice.finish_reason);
  if (follows) showEnd();
}

function showEnd() {
  const log = find("conversation");
  log.scrollTop = log.scrollHeight;
}

function figures(chunk, reason) {
  const { timings, quasar } = chunk;
  const parts = [`${timings.predicted_n} tokens`];
  if (timings.predicted_per_second) parts.push(`${timings.predicted_per_second.toFixed(1)} tokens/s`);
  if (quasar.acceptance_length) parts.push(`acceptance length ${quasar.acceptance_length.toFixed(2)}`);
  if (quasar.confirm_rate !== null) parts.push(`confirm rate ${quasar.confirm_rate.toFixed(2)}`);
  if (timings.draft_n) parts.push(`${timings.draft_n_accepted} of ${timings.draft_n} draft tokens accepted`);
  parts.push(quasar.lossless ? `${quasar.verify}: the model's own text` : `${quasar.verify}: the copy's text`);
  if (reason === "length") parts.push("cut at its length");
  return parts.join(" · ");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (waiting + value).split("\n\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(text) {
  const told = messages;
  told.push({ role: "user", content: text });
  add("user", "You").text.textContent = text;
  const answer = { ...add("assistant", "Answer"), whole: "", verify: find("verify").value };
  const own = (running = new AbortController());
  showEnd();
  buttons();
  say("Writing …");
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: own.signal,
      body: JSON.stringify({
        messages: told,
        stream: true,
        trace: true,
        verify: answer.verify,
        draft: find("draft").value,
        temperature: Number(find("temperature").value),
        max_tokens: Number(find("length").value),
      }),
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const chunk of events(reply.body)) take(chunk, answer);
    say("The answer has ended.");
  } catch (error) {
    if (told === messages) fail(answer, error, text);
  }
  if (answer.whole) told.push({ role: "assistant", content: answer.whole });
  else told.pop();
  if (running !== own) return; // a new conversation is being written already
  running = null;
  buttons();
  find("message").focus();
}

function fail(answer, error, text) {
  const stopped = error.name === "AbortError";
  const sentence = error instanceof TypeError ? "The server does not answer." : error.message;
  answer.figures.classList.toggle("error", !stopped);
  answer.figures.textContent = stopped ? "stopped" : sentence;
  say(stopped ? "Stopped." : "The answer failed.");
  if (!answer.whole && !find("message").value) find("message").value = text;
  showEnd();
}

function buttons() {
  find("send").disabled = running !== null;
  find("stop").disabled = running === null;
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = find("message").value;
  if (running || !text.trim()) return;
  if (!known) return start();
  find("message").value = "";
  ask(text);
});
find("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
find("stop").addEventListener("click", () => running && running.abort());
find("clear").addEventListener("click", () => {
  if (running) running.abort();
  running = null;
  messages = [];
  find("conversation").replaceChildren();
  say("A new conversation.");
  buttons();
  find("message").focus();
});
find("origins").addEventListener("change", () => document.body.classList.toggle("coloured", find("origins").checked));
find("verify").addEventListener("change", promise);
find("temperature").addEventListener("change", promise);
find("enter").addEventListener("submit", async (event) => {
  event.preventDefault();
  await start();
  if (known) find("message").focus();
});
find("ask").addEventListener("invalid", () => (find("settings").open = true), true); // else the fault is not seen
const wide = matchMedia("(min-width: 40rem)");
function fold() {
  for (const part of document.querySelectorAll("details")) part.open = wide.matches;
}
wide.addEventListener("change", fold);
fold();
document.body.classList.add("coloured");
start();
