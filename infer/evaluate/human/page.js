// Shows the pairs one at a time and keeps the answers in this browser; knows opaque ids only.
"use strict";
(() => {
  const kit = JSON.parse(document.getElementById("kit").textContent);
  const pairs = kit.pairs;
  const slot = `answers-${kit.kit}`;
  const questions = ["subject", "text"];
  const keys = { 1: ["subject", "A"], 2: ["subject", "tie"], 3: ["subject", "B"],
    4: ["text", "A"], 5: ["text", "tie"], 6: ["text", "B"] };
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];

  const blank = () => {
    const numbers = crypto.getRandomValues(new Uint8Array(6));
    const session = [...numbers].map((number) => number.toString(16).padStart(2, "0")).join("");
    return { session, rater: "", started: false, at: 0, answers: {} };
  };
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(slot)); } catch { /* unreadable or forbidden: as if there were none */ }
  let state = { ...blank(), ...kept };

  const save = () => {
    try { localStorage.setItem(slot, JSON.stringify(state)); } catch { one("#storage-warning").hidden = false; }
  };
  const whole = (pair) => questions.every((question) => state.answers[pair.id]?.[question]);
  const missing = () => pairs.filter((pair) => !whole(pair));

  const enlarge = (image) => {
    const large = one("#enlarged img");
    large.src = image.src;
    large.alt = image.alt;
    one("#enlarged").showModal();
  };

  const showReferences = (pair) => {
    const several = pair.words.length > 1;
    one("#ask-subject").textContent =
      several ? "Which shows the same subjects as the references?" : "Which shows the same subject as the reference?";
    one("[data-reference-title]").textContent = pair.references.length > 1 ? "References" : "Reference";
    one("[data-references]").replaceChildren(...pair.references.map((place, index) => {
      const word = pair.references.length === pair.words.length ? pair.words[index] : pair.words.join(", ");
      const holder = document.createElement("div");
      holder.innerHTML = "<button class='picture'><img></button>";
      const image = one("img", holder);
      image.src = kit.pictures[place];
      image.alt = `Reference: ${word}`;
      one("button", holder).onclick = () => enlarge(image);
      if (several) {
        const label = document.createElement("span");
        label.textContent = word;
        holder.append(label);
      }
      return holder;
    }));
  };

  const showChoices = () => {
    const pair = pairs[state.at];
    for (const button of all("[data-choice]")) {
      const { question, choice } = button.dataset;
      button.setAttribute("aria-pressed", String(state.answers[pair.id]?.[question] === choice));
    }
    one("[data-next-label]").textContent = whole(pair) ? "Next" : "Skip";
    one("[data-next]").classList.toggle("main", whole(pair));
  };

  const showEnd = () => {
    const open = missing().length;
    one("[data-summary]").textContent = open
      ? `${open} of ${pairs.length} pairs are not fully answered. You can still answer them, or send what you have.`
      : `All ${pairs.length} pairs are answered. Please download your answers and send the file to whoever gave you ` +
        "this page.";
    one("[data-missing]").hidden = !open;
    one("[data-downloaded]").textContent = "";
  };

  const show = () => {
    const screen = !state.started ? "start" : state.at < pairs.length ? "rating" : "end";
    for (const main of all("main")) main.hidden = main.id !== screen;
    if (screen === "rating") {
      const pair = pairs[state.at];
      one("[data-number]").textContent = state.at + 1;
      one("progress").max = pairs.length;
      one("progress").value = state.at;
      one("[data-prompt]").textContent = pair.prompt;
      for (const side of ["a", "b"]) one(`[data-side=${side}] img`).src = kit.pictures[pair[side]];
      one("#rating [data-back]").disabled = state.at === 0;
      showReferences(pair);
      showChoices();
    }
    if (screen === "end") showEnd();
    one(`#${screen} h1`).focus();  // where a screen reader starts to read, and away from a button of the last pair
    scrollTo(0, 0);
  };

  const go = (place) => {
    state.at = Math.min(Math.max(place, 0), pairs.length);
    save();
    show();
  };
  const answer = (question, choice) => {
    const pair = pairs[state.at];
    state.answers[pair.id] = { ...state.answers[pair.id], [question]: choice };
    save();
    showChoices();
    one("#status").textContent = `${question === "text" ? "Text" : "Subject"}: ${choice}`;
  };

  const download = () => {
    const told = { kit: kit.kit, session: state.session, rater: state.rater, answers: state.answers };
    const name = state.rater.replace(/[^\p{L}\p{N}_-]+/gu, "-").replace(/^-+|-+$/g, "");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(told, null, 1)], { type: "application/json" }));
    link.download = `answers-${name || state.session.slice(0, 6)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    one("[data-downloaded]").textContent = one("#status").textContent = `Downloaded: ${link.download}`;
  };

  for (const place of all("[data-count]")) place.textContent = pairs.length;
  one("[data-minutes]").textContent = Math.max(1, Math.round(pairs.length / 6));  // ten seconds a pair
  one("#begin").onsubmit = (event) => {
    event.preventDefault();
    Object.assign(state, { rater: one("#rater").value.trim(), started: true });
    go(0);
  };
  for (const button of all("[data-choice]")) {
    button.onclick = () => answer(button.dataset.question, button.dataset.choice);
  }
  for (const button of all("[data-side]")) button.onclick = () => enlarge(one("img", button));
  for (const button of all("[data-back]")) button.onclick = () => go(state.at - 1);
  for (const button of all("[data-download]")) button.onclick = download;
  one("[data-next]").onclick = () => go(state.at + 1);
  one("[data-missing]").onclick = () => go(pairs.indexOf(missing()[0]));
  one("[data-afresh]").onclick = () => {
    if (!confirm("Forget these answers and start anew? Download them first.")) return;
    state = blank();
    one("#rater").value = "";
    save();
    show();
  };
  one("#enlarged button").onclick = () => one("#enlarged").close();

  document.addEventListener("keydown", (event) => {
    const elsewhere = one("#rating").hidden || one("#enlarged").open || event.repeat;
    if (elsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
    // By position too: on some keyboards the digits need Shift.
    const chosen = keys[event.key] ?? keys[/^(?:Digit|Numpad)([1-6])$/.exec(event.code)?.[1]];
    if (chosen) answer(...chosen);
    else if (event.key === "ArrowLeft") go(state.at - 1);
    else if (event.key === "ArrowRight") go(state.at + 1);
    else if (event.key === "Enter" && (event.target.tagName !== "BUTTON" || event.target.ariaPressed === "true")) {
      go(state.at + 1);  // on what is chosen already, Enter has nothing else to do
    }
    else return;
    event.preventDefault();
  });
  show();
})();
