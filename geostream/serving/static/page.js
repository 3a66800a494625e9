// The page: takes photos, asks the server about each, and shows the answers. The map is in map.js.
import { PlaceMap } from "./map.js";

const MOST = 50; // photos at once; the answers stay on the page
const TOGETHER = 3; // requests under way
const RETRIES = 20; // while the server is busy

const byId = (id) => document.getElementById(id);
const photos = []; // {file, url, state: waiting | done | failed, answer, error, button}
let info = null;
let map = null;
let shown = null; // the photo whose answer is on the page
let running = 0;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

async function start() {
  try {
    const response = await fetch("api/info");
    if (!response.ok) throw new Error((await response.json()).error);
    info = await response.json();
  } catch (error) {
    byId("about").textContent = "";
    say(`The server does not answer: ${error.message}. Load the page again.`, true);
    return;
  }
  byId("about").textContent = `${info.dataset}: ${info.places.toLocaleString("en")} places, model ${info.model}`;
  byId("hint").textContent = `JPEG, PNG, WebP or TIFF, up to ${Math.floor(info.limits.file_bytes / 2 ** 20)} MB each`;
  byId("source").textContent = info.attribution ?? "";
  if (info.map.kind === "none") {
    byId("nomap").hidden = false;
    byId("nomap").textContent = "The places of this data set have no coordinates, so there is no map. "
      + "The best fitting tiles are shown beside the photo.";
    return;
  }
  try {
    map = new PlaceMap(byId("map"), info, { choose, fail: (text) => say(text, true) });
  } catch (error) {
    byId("nomap").hidden = false;
    byId("nomap").textContent = "This browser cannot show the map (it needs WebGL 2). The answers are complete without it.";
  }
}

// Taking photos

function take(files) {
  const images = [...files];
  if (!images.length || !info) return;
  if (photos.length + images.length > MOST) {
    say(`${images.length} photos are too many: up to ${MOST} fit on the page.`, true);
    return;
  }
  byId("drop").classList.add("small");
  for (const file of images) {
    const photo = { file, url: URL.createObjectURL(file), state: "waiting" };
    photo.button = make("button", { type: "button", onclick: () => show(photo) },
      make("img", { src: photo.url, alt: "" }), make("span", { className: "mark wait" }));
    byId("photos").append(make("li", {}, photo.button));
    photos.push(photo);
    label(photo);
  }
  say("");
  work();
}

function work() {
  while (running < TOGETHER) {
    const next = photos.find((photo) => photo.state === "waiting" && !photo.asked);
    if (!next) break;
    next.asked = true;
    running += 1;
    ask(next).finally(() => { running -= 1; work(); });
  }
  progress();
}

async function ask(photo) {
  try {
    if (photo.file.size > info.limits.file_bytes) {
      throw new Error(`${photo.file.name}: larger than ${Math.floor(info.limits.file_bytes / 2 ** 20)} MB`);
    }
    const answer = await locate(photo.file);
    Object.assign(photo, { state: "done", answer });
  } catch (error) {
    Object.assign(photo, { state: "failed", error: error.message });
  }
  label(photo);
  if (shown === null || shown === photo) show(photo);
}

async function locate(file) {
  for (let attempt = 0; ; attempt += 1) {
    const form = new FormData();
    form.append("photos", file, file.name);
    let response;
    try {
      response = await fetch("api/locate", { method: "POST", body: form });
    } catch {
      throw new Error(`${file.name}: the server cannot be reached`);
    }
    if (response.status === 429 && attempt < RETRIES) {
      await new Promise((done) => setTimeout(done, 1000 * Number(response.headers.get("Retry-After") ?? 1)));
      continue;
    }
    const body = await response.json().catch(() => ({ error: `${file.name}: the server failed (${response.status})` }));
    if (!response.ok) throw new Error(body.error);
    return body.answers[0];
  }
}

function progress() {
  const ready = photos.filter((photo) => photo.state !== "waiting").length;
  const all = photos.length;
  byId("waiting").hidden = ready === all;
  Object.assign(byId("progress"), { max: Math.max(all, 1), value: ready });
  byId("download").hidden = !photos.some((photo) => photo.state === "done");
  if (all && ready < all) say(`${ready} of ${all} photos answered…`);
  else if (all && shown) say(all > 1 ? `All ${all} photos answered.` : summary(shown), shown.state === "failed" && all === 1);
}

// Showing answers

function summary(photo) {
  if (photo.state === "waiting") return `${photo.file.name}: waiting for the answer`;
  if (photo.state === "failed") return photo.error;
  return `${photo.file.name}: ${photo.answer.sure ? "sure" : "not sure"}`;
}

function label(photo) {
  const mark = photo.button.querySelector(".mark");
  const kind = { waiting: "wait", failed: "wrong" }[photo.state] ?? (photo.answer.sure ? "sure" : "unsure");
  mark.className = `mark ${kind}`;
  mark.textContent = { wait: "", wrong: "!", sure: "✓", unsure: "?" }[kind];
  photo.button.setAttribute("aria-label", summary(photo));
  photo.button.title = photo.file.name;
}

function show(photo) {
  shown = photo;
  for (const other of photos) other.button.setAttribute("aria-current", other === photo);
  byId("result").hidden = false;
  Object.assign(byId("photo"), { src: photo.url, alt: `The photo ${photo.file.name}` });
  byId("name").textContent = photo.file.name;
  byId("again").hidden = photo.state !== "failed";
  byId("fits").hidden = photo.state !== "done";
  byId("candidates").replaceChildren();
  byId("legend").hidden = true;
  const box = byId("verdict").parentElement;
  if (photo.state !== "done") {
    const failed = photo.state === "failed";
    box.className = failed ? "verdict wrong" : "verdict";
    byId("verdict").textContent = failed ? "No answer" : "Looking…";
    byId("why").textContent = failed ? photo.error : "";
    map?.clear();
    return;
  }
  const { answer } = photo;
  box.className = answer.sure ? "verdict sure" : "verdict unsure";
  byId("verdict").textContent = answer.sure ? "Sure" : "Not sure";
  byId("why").textContent = [
    answer.sure ? "The best place stands out clearly." : "No place stands out; take these as suggestions.",
    answer.error_metres === null ? "" : `The best place is ${metres(answer.error_metres)} from where the photo says it was taken.`,
  ].join(" ").trim();
  const [best] = answer.candidates;
  answer.candidates.forEach((candidate, row) => {
    const share = Math.max(0, Math.min(1, candidate.score / best.score));
    const bar = make("i");
    bar.style.width = `${Math.round(100 * share)}%`;
    const button = make("button", { type: "button", onclick: () => choose(row, true) },
      make("span", { className: "tile" },
        make("img", { src: candidate.tile, alt: "", loading: "lazy" }),
        make("span", { className: "number", textContent: row + 1 })),
      make("span", { className: "bar", ariaHidden: "true" }, bar),
      make("span", { className: "score", textContent: candidate.score.toFixed(3) }),
      make("span", { className: "at", textContent: where(candidate) }));
    button.setAttribute("aria-label", `Place ${row + 1}: score ${candidate.score.toFixed(3)}, ${where(candidate)}`);
    button.setAttribute("aria-pressed", "false");
    byId("candidates").append(make("li", {}, button));
  });
  byId("legend").hidden = !map;
  map?.show(answer);
}

function where(candidate) {
  if (candidate.latitude === null) return candidate.key;
  return `${candidate.latitude.toFixed(5)}, ${candidate.longitude.toFixed(5)}`;
}

function metres(distance) {
  return distance < 1000 ? `${Math.round(distance)} m` : `${(distance / 1000).toFixed(1)} km`;
}

function choose(row, fly) {
  byId("candidates").querySelectorAll("button").forEach((button, number) => {
    button.setAttribute("aria-pressed", number === row);
    if (number === row && !fly) button.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  map?.choose(row, fly);
}

function download() {
  const features = photos.filter((photo) => photo.answer).flatMap((photo) => photo.answer.geojson.features);
  const text = JSON.stringify({ type: "FeatureCollection", features }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/geo+json" }));
  make("a", { href: url, download: "places.geojson" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// Arrow keys walk through a row of buttons, as through the photos and the places.
function walk(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  if (!step || at < 0) return;
  event.preventDefault();
  const next = buttons[Math.max(0, Math.min(buttons.length - 1, at + step))];
  next.focus();
  next.click();
}

byId("files").addEventListener("change", (event) => { take(event.target.files); event.target.value = ""; });
byId("photos").addEventListener("keydown", walk);
byId("candidates").addEventListener("keydown", walk);
byId("download").addEventListener("click", download);
byId("again").addEventListener("click", () => {
  Object.assign(shown, { state: "waiting", asked: false });
  label(shown);
  show(shown);
  work();
});
let depth = 0; // dragenter and dragleave come for every child, too
addEventListener("dragenter", (event) => { event.preventDefault(); depth += 1; byId("drop").classList.add("over"); });
addEventListener("dragleave", () => { depth -= 1; if (!depth) byId("drop").classList.remove("over"); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  byId("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
start();
