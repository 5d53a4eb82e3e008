// The page works without this script, by form posts. With it, answers come in place: links,
// files, drops, pastes, the camera and the samples all end in classify().
"use strict";

const AT_A_TIME = 3; // requests of a gallery that are under way together

const form = document.querySelector("#form");
const problemLine = document.querySelector("#problem");
const drop = document.querySelector("#drop");
const section = document.querySelector("#answer");
const cards = document.querySelector("#cards");
const announcer = document.querySelector("#announcer");
const lock = document.querySelector("#lock");
const blankCard = document.querySelector("#blank").content.firstElementChild;
const blankRow = blankCard.querySelector(".chart li");
const SHOWN = blankCard.querySelectorAll(".chart li:not(.others)").length; // rows of a chart

/** What went wrong, as a sentence for the visitor. */
class Problem extends Error {
  constructor(sentence, worthRepeating) {
    super(sentence);
    this.worthRepeating = worthRepeating;
  }
}

// ---- One batch: a card for each picture, a few requests at a time

let batch = new AbortController();

/** Ask for every picture; each is {name} with a link, a file, or a sample and its source. */
async function classify(pictures) {
  batch.abort(); // a new choice replaces what is still under way
  batch = new AbortController();
  const { signal } = batch;
  const jobs = pictures.map((picture) => ({ ...picture, signal, card: makeCard(picture) }));
  cards.classList.toggle("gallery", jobs.length > 1);
  cards.replaceChildren(...jobs.map((job) => job.card));
  if (jobs.length === 1 && jobs[0].link) form.url.value = jobs[0].link;
  showProblem("");
  announce(jobs.length > 1 ? `Looking at ${jobs.length} pictures …` : "Looking at the picture …");
  cards.scrollIntoView({ block: "nearest" });

  const queue = jobs.values();
  const work = async () => {
    for (const job of queue) await run(job);
  };
  await Promise.all(Array.from({ length: AT_A_TIME }, work));
  if (jobs.length > 1 && !signal.aborted) {
    const failed = cards.querySelectorAll(".failed").length;
    announce(`${jobs.length - failed} of ${jobs.length} pictures are answered.`);
  }
}

/** Ask for one picture and show in its card what comes of it. */
async function run(job) {
  const { card, signal } = job;
  card.classList.remove("failed");
  card.querySelector(".again").hidden = true;
  card.querySelector(".problem").textContent = "";
  card.querySelector("h3").textContent = "Looking at the picture …";
  card.setAttribute("aria-busy", "true");
  try {
    showAnswer(job, await ask(job));
  } catch (error) {
    if (!signal.aborted) showFailure(job, error);
  }
  card.removeAttribute("aria-busy");
}

// ---- The gateway

/** Return the gateway's answer, or throw a Problem. */
async function ask({ link, file, sample, name, signal }) {
  let body = JSON.stringify({ url: link, sample, preview: true });
  if (file) {
    body = new FormData();
    body.append("file", file, name);
    body.append("preview", "true");
  }
  for (;;) {
    const key = store.gatewayKey;
    const headers = key ? { Authorization: `Bearer ${asHeader(key)}` } : {};
    const options = { method: "POST", headers, body, signal };
    const response = await fetch("predict", options).catch(failToReach);
    if (response.ok) return response.json().catch(failToReach);
    if (response.status !== 401) {
      const worthRepeating = response.status === 429 || response.status >= 500;
      throw new Problem(await explain(response), worthRepeating);
    }
    // Another request of the gallery may have brought a new key in the meantime, or a refusal.
    if (store.gatewayKey === key && (refused === signal || !(await askForKey(key)))) {
      refused = signal;
      throw new Problem("Without its key, the gateway gives no answer.", true);
    }
  }
}

function failToReach() {
  throw new Problem("The gateway cannot be reached; check your connection, then try again.", true);
}

/** The sentence of a problem document, and how long to wait where the gateway says so. */
async function explain(response) {
  const problem = await response.json().catch(() => ({}));
  const detail = problem.detail ?? `The gateway answers ${response.status}; try again later.`;
  const sentence = detail.replace(/(https?:\/\/\S{40})\S+/g, "$1…"); // the field shows the rest
  const wait = Number(response.headers.get("Retry-After"));
  if (!wait) return sentence;
  const [time, unit] = wait < 100 ? [wait, "s"] : [Math.ceil(wait / 60), "min"];
  return `${sentence} Please wait ${time}\u00a0${unit}.`;
}

// ---- The key, where the gateway wants one

// Where the browser forbids storage, the key lasts as long as the page.
let store = {};
try {
  store = window.sessionStorage;
} catch {}

let asking = null; // the promise of the dialog while it is open
let refused = null; // the signal of the batch for which no key was given

/** Ask for the key once, however many requests wait for it; return whether one was given. */
function askForKey(wrongKey) {
  asking ??= new Promise((resolve) => {
    document.querySelector("#lock-problem").textContent = wrongKey
      ? "That key is not the right one."
      : "It is kept until you close this tab.";
    lock.returnValue = "";
    lock.querySelector("form").reset();
    lock.showModal();
    lock.onclose = () => {
      asking = null;
      const given = lock.returnValue === "open";
      if (given) store.gatewayKey = lock.querySelector("#key").value;
      resolve(given);
    };
  });
  return asking;
}

/** The text as UTF-8, one character a byte, which is what a header can carry. */
function asHeader(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

// ---- What a card shows

function makeCard({ name, link, file, source }) {
  const card = blankCard.cloneNode(true);
  card.querySelector("figcaption").textContent = name;
  // The page itself loads nothing from elsewhere: a link's picture comes with the answer.
  if (!link) showPicture(card, file ? URL.createObjectURL(file) : source);
  return card;
}

function showPicture(card, source) {
  const image = new Image();
  image.alt = `The picture ${card.querySelector("figcaption").textContent}`;
  const release = () => URL.revokeObjectURL(source);
  image.addEventListener("load", release, { once: true });
  image.addEventListener(
    "error",
    () => {
      release();
      if (card.preview) image.src = card.preview;
      else image.remove();
    },
    { once: true },
  );
  image.src = source;
  card.querySelector(".picture").append(image);
}

function showAnswer({ card }, answer) {
  card.classList.remove("empty");
  card.preview = answer.preview;
  if (!card.querySelector("img")) showPicture(card, answer.preview);

  const ranked = Object.entries(answer.predictions).sort(([, one], [, other]) => other - one);
  const others = [...card.querySelectorAll(".chart .others")];
  for (const line of others) line.textContent = sumUp(ranked.slice(SHOWN));
  card.querySelector(".chart").replaceChildren(...ranked.slice(0, SHOWN).map(makeRow), ...others);
  const sentence = describe(ranked);
  card.querySelector("h3").textContent = sentence;

  const { name, version } = answer.model;
  const facts = { model: `${name}, version ${version}` };
  for (const [stage, seconds] of Object.entries(answer.seconds)) {
    facts[stage] = `${Math.max(1, Math.round(1000 * seconds))}\u00a0ms`;
  }
  for (const element of card.querySelectorAll("[data-fact]")) {
    element.textContent = facts[element.dataset.fact] ?? "–";
  }
  if (cards.childElementCount === 1) announce(sentence);
}

function makeRow([name, probability]) {
  const row = blankRow.cloneNode(true);
  row.querySelector(".name").textContent = name;
  row.querySelector("rect").setAttribute("width", `${100 * probability}%`);
  row.querySelector(".value").textContent = percent(probability, 1);
  return row;
}

function sumUp(others) {
  const together = others.reduce((sum, [, probability]) => sum + probability, 0);
  return `and ${others.length} others, together ${percent(together, 1)}`;
}

const percent = (probability, digits) => `${(100 * probability).toFixed(digits)}\u00a0%`;

/** The best class in words, and the second as well where the best is not sure. */
function describe(ranked) {
  const rounded = (probability) => percent(Math.min(0.99, probability), 0);
  const [[name, best]] = ranked;
  if (best >= Number(section.dataset.unsure)) return `${name}, ${rounded(best)}`;
  const choice = ranked.slice(0, 2).map(([each, value]) => `${each} (${rounded(value)})`);
  return `Perhaps ${choice.join(" or ")}`;
}

function showFailure(job, { message, worthRepeating }) {
  const { card, link } = job;
  const again = card.querySelector(".again");
  card.classList.add("failed");
  card.querySelector("h3").textContent = "No answer for this picture.";
  again.hidden = !worthRepeating;
  again.onclick = async () => {
    card.focus(); // the button is about to vanish
    refused = null;
    showProblem("");
    await run(job);
    if (cards.childElementCount > 1) announce(card.querySelector("h3").textContent);
  };
  const place = card.querySelector(".problem");
  if (cards.childElementCount > 1) {
    place.textContent = message;
    return;
  }
  announce(message);
  if (link) {
    showProblem(message, link);
    for (const part of [form.url.labels[0], problemLine]) part.scrollIntoView({ block: "nearest" });
  } else {
    place.textContent = message;
    place.scrollIntoView({ block: "nearest" });
  }
}

/** Show a sentence beside the field, or with "" the hint again. */
function showProblem(sentence, concernsField = false) {
  problemLine.textContent = sentence;
  form.url.setAttribute("aria-invalid", Boolean(sentence && concernsField));
}

/** Say it to those who do not see the page. */
function announce(sentence) {
  announcer.textContent = sentence;
}

// ---- The ways in

const fromFile = (file) => ({ name: file.name, file });
const fromLink = (link) => ({ name: link, link });

/** The pictures in a paste or a drop: files, else the links in its text. */
function picturesIn(transfer) {
  if (transfer.files.length) return [...transfer.files].map(fromFile);
  const text = transfer.getData("text/uri-list") || transfer.getData("text/plain");
  const links = text.split(/\s+/).filter((word) => /^https?:\/\//i.test(word));
  return links.map(fromLink);
}

/** Text that is pasted or dropped into a field belongs to the field, but for several links. */
const isForField = (event, transfer) =>
  event.target.closest?.("input:not([type=file])") &&
  !transfer.types.includes("Files") &&
  picturesIn(transfer).length < 2;

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const link = form.url.value.trim();
  if (event.submitter?.name === "sample") {
    const sample = event.submitter.value;
    const source = event.submitter.querySelector("img").src;
    classify([{ name: `A sample: ${sample}`, sample, source }]);
  } else if (link) {
    classify([fromLink(link)]);
  } else {
    const sentence = "Paste a link or choose a picture first.";
    showProblem(sentence, true);
    announce(sentence);
    form.url.focus();
  }
});

form.file.multiple = true; // a form post is about one picture

for (const input of form.querySelectorAll("input[type=file]")) {
  input.addEventListener("change", () => {
    if (input.files.length) classify([...input.files].map(fromFile));
    input.value = ""; // so that the same file can be chosen again
  });
}

document.addEventListener("paste", (event) => {
  if (lock.open || isForField(event, event.clipboardData)) return;
  const pictures = picturesIn(event.clipboardData);
  if (!pictures.length) return;
  event.preventDefault();
  classify(pictures);
});

document.addEventListener("dragover", (event) => {
  if (isForField(event, event.dataTransfer)) return;
  event.preventDefault();
  drop.classList.add("over");
});

document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});

document.addEventListener("drop", (event) => {
  drop.classList.remove("over");
  if (isForField(event, event.dataTransfer)) return;
  event.preventDefault(); // or the browser would leave the page to show the file
  const pictures = picturesIn(event.dataTransfer);
  if (pictures.length) classify(pictures);
});
