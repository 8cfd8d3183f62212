// The page at /: sends a picture, shows labels and scores, and follows the live version.
// Its paths are relative, so that a proxy may offer it under one of its own.

const WAIT_SECONDS = 15;
const PAUSE_MS = 1000;  // before asking again what gave no news
const at = (id) => document.getElementById(id);
const drop = at("drop"), file = at("file"), picture = at("picture"), labels = at("labels"), token = at("token");
const said = at("said"), answers = at("answers"), badge = at("live"), seen = at("history");

let blob = null;      // the picture that is shown
let version = null;   // the version that answered last
let waiting = new AbortController();  // ends the question for another version
let asked = 0;        // only the newest question may show its answer

token.value = sessionStorage.getItem("token") ?? "";

function headers() {
  return token.value ? { Authorization: `Bearer ${token.value}` } : {};
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  at("token-field").hidden &&= answer.status !== 401;
  const document_ = await answer.json();
  if (!answer.ok) throw new Error(document_.error ?? `status ${answer.status}`);
  return document_;
}

async function classify() {
  if (!blob) return;
  const number = ++asked;
  const form = new FormData();
  form.append("image", blob, "picture");
  for (const label of labels.value.split(",").map((text) => text.trim()).filter(Boolean)) form.append("labels", label);
  const started = performance.now();
  try {
    const answer = await ask("classify", { method: "POST", body: form });
    if (number === asked) show(answer, performance.now() - started);
  } catch (error) {
    if (number === asked) tell(error.message, true);
  }
}

function show(answer, milliseconds) {
  answers.replaceChildren(...answer.predictions[0].map(line));
  tell(`Version ${answer.model_version} said so in ${Math.round(milliseconds)} ms.`);
}

function line({ label, score }) {
  const item = document.createElement("li"), row = document.createElement("div"), meter = document.createElement("meter");
  const name = document.createElement("span"), value = document.createElement("span");
  name.className = "label";
  name.textContent = label;
  value.className = "score";
  value.textContent = `${(100 * score).toFixed(1)} %`;
  meter.value = score;
  meter.textContent = value.textContent;
  row.append(name, value);
  item.append(row, meter);
  return item;
}

function tell(text, isBad = false) {
  said.textContent = text;
  said.classList.toggle("bad", isBad);
}

function take(found) {
  if (!found) return;
  blob = found;
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(found);
  picture.hidden = false;
  at("hint").hidden = true;
  classify();
}

// A hidden tab gives its connection back: a browser has only six for one server.
document.addEventListener("visibilitychange", () => document.hidden ? waiting.abort() : follow());

async function follow() {
  if (document.hidden) return;
  waiting.abort();
  waiting = new AbortController();
  const { signal } = waiting, started = performance.now();
  let pause = PAUSE_MS;
  try {
    // Answered when another version is live, or after some seconds.
    const path = version === null ? "version" : `version?other_than=${version}`;
    const live = await ask(path, { signal, headers: { Prefer: `wait=${WAIT_SECONDS}` } });
    if (live.model_version !== version || performance.now() - started > PAUSE_MS) pause = 0;
    badge.classList.remove("gone");
    badge.textContent = `version ${live.model_version} · ${live.classes} classes`;
    if (live.model_version !== version) {
      const isChange = version !== null;
      version = live.model_version;
      const entry = document.createElement("li");
      entry.textContent = `${new Date().toLocaleTimeString()}  version ${version} is live`;
      seen.prepend(entry);
      if (isChange) {
        badge.classList.remove("changed");
        void badge.offsetWidth; // starts the animation anew
        badge.classList.add("changed");
        classify();
      }
    }
  } catch (error) {
    if (signal.aborted) return;
    badge.classList.add("gone");
    badge.textContent = error instanceof TypeError ? "the server is gone" : error.message;
  }
  setTimeout(() => signal.aborted || follow(), pause);
}

drop.addEventListener("click", () => file.click());
drop.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") file.click();
});
file.addEventListener("click", (event) => event.stopPropagation());
file.addEventListener("change", () => take(file.files[0]));
for (const kind of ["dragover", "dragenter"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
labels.addEventListener("change", classify);
token.addEventListener("change", () => {
  sessionStorage.setItem("token", token.value);
  classify();
});
at("token-field").addEventListener("submit", (event) => event.preventDefault());  // "change" has done it
follow();
