"use strict";
// The trace viewer: a text whose tokens are coloured by who made them. Arrow keys, Home and End move between tokens.
(() => {
  const source = document.getElementById("trace-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const choice = document.getElementById("trace-choice");
  const box = document.getElementById("trace-text");
  const told = document.getElementById("trace-told");
  const body = document.querySelector("#trace-table tbody");
  let tokens = [];
  let at = -1;

  const number = (value) => (value === null ? null : value.toFixed(2) + " nats");
  const shown = (text) => (text === "" ? "(no text)" : "“" + text.replace(/\n/g, "↵") + "”");

  function describe(token) {
    const parts = [shown(token.text) + ": " + made(token)];
    if (token.margin !== null) parts.push((data.confirmed ? "the verifier's margin " : "margin ") + number(token.margin));
    if (token.target_margin !== null) parts.push("the target's margin " + number(token.target_margin));
    if (token.step >= 0) parts.push("pass " + (token.step + 1));
    return parts.join("; ");
  }

  function made(token) {
    if (token.by === "draft") return "drafted by " + token.drafter + ", accepted" + (token.confirmed ? " and confirmed" : "");
    if (token.by === "bonus") return "the verify pass's own" + (token.confirmed ? ", confirmed" : "");
    if (token.by === "target") return "the confirm's own token, behind a window that it accepted whole";
    if (token.by === "corrected") return "corrected by the confirm" + (token.refused ? ", in place of " + shown(token.refused) : "");
    return "from the prompt's pass";
  }

  function show(index) {
    const trace = data.traces[index];
    const drafters = [...new Set(trace.tokens.map((token) => token.drafter).filter(Boolean))];
    data.confirmed = trace.verify === "exact";
    tokens = trace.tokens.map((token, place) => {
      const span = document.createElement("span");
      const before = trace.tokens[place - 1];
      span.className = "t " + token.by + (token.by === "draft" ? " d" + drafters.indexOf(token.drafter) : "");
      if (!before || before.step !== token.step || before.by !== token.by) span.classList.add("first");
      span.textContent = token.text;
      span.dataset.place = place;
      span.id = "token-" + place;
      span.setAttribute("role", "option");
      span.token = token;
      return span;
    });
    box.replaceChildren(...tokens);
    body.replaceChildren(...trace.tokens.map(row));
    at = -1;
    box.removeAttribute("aria-activedescendant");
    told.textContent = trace.about;
    for (const item of document.querySelectorAll("#trace-key [data-by]")) {
      const count = trace.tokens.filter((token) => token.by === item.dataset.by).length;
      item.querySelector("b").textContent = count;
      item.hidden = count === 0;
    }
  }

  function row(token, place) {
    const line = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = place + 1;
    line.append(head);
    for (const cell of [shown(token.text), made(token), number(token.margin) ?? "–", number(token.target_margin) ?? "–"]) {
      const place = document.createElement("td");
      place.textContent = cell;
      line.append(place);
    }
    return line;
  }

  function tell(place, move) {
    if (at >= 0 && tokens[at]) tokens[at].classList.remove("now");
    at = place;
    const span = tokens[place];
    told.textContent = describe(span.token);
    if (move) {
      span.classList.add("now");
      box.setAttribute("aria-activedescendant", span.id);
      span.scrollIntoView({ block: "nearest" });
    }
  }

  function placeOf(event) {
    const span = event.target.closest(".t");
    return span ? Number(span.dataset.place) : -1;
  }

  choice.addEventListener("change", () => show(Number(choice.value)));
  box.addEventListener("pointerover", (event) => placeOf(event) >= 0 && tell(placeOf(event), false));
  box.addEventListener("click", (event) => placeOf(event) >= 0 && tell(placeOf(event), true));
  box.addEventListener("focus", () => tokens.length && at < 0 && tell(0, true));
  box.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 };
    moves.ArrowDown = moves.ArrowRight;
    moves.ArrowUp = moves.ArrowLeft;
    if (!(event.key in moves) || !tokens.length) return;
    event.preventDefault();
    tell(Math.min(Math.max(moves[event.key], 0), tokens.length - 1), true);
  });
  show(0);
})();
