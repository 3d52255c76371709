"use strict";
// One listener's session: begin, trial after trial, end. Kept in this browser after every answer; sent to the server
// that serves the page, if there is one (ssd-repro listening-test serve), and always there to download.
const DATA = JSON.parse(document.getElementById("data").textContent);
const KEEP = "listening-test-" + DATA.build;
const SERVED = location.protocol.startsWith("http");
const PARTS = {
  NAT: {
    name: "naturalness", question: "How natural does this sample sound?", clips: ["Sample"], keys: ["p"],
    explain: "Judge the speech alone, not what it says: could a person have spoken it so?",
    choices: [[5, "Excellent: completely natural"], [4, "Good: mostly natural"],
      [3, "Fair: equally natural and unnatural"], [2, "Poor: mostly unnatural"], [1, "Bad: completely unnatural"]],
  },
  SIM: {
    name: "similarity", question: "How similar is the voice to the reference?", clips: ["Reference", "Sample"],
    keys: ["r", "p"], explain: "Judge whether one person could have spoken both, not the words or the sound quality.",
    choices: [[5, "Certainly the same speaker"], [4, "Probably the same speaker"], [3, "Cannot tell"],
      [2, "Probably another speaker"], [1, "Certainly another speaker"]],
  },
  ABX: {
    name: "comparison", question: "Which one was made as X was, A or B?", clips: ["A", "B", "X"],
    keys: ["a", "b", "x"], explain: "A and B say the same sentence in two ways of making speech. X was made in one " +
      "of these two ways; mostly it says something else. If you cannot tell, guess.",
    choices: [["A", "A was made as X was"], ["B", "B was made as X was"]],
  },
};
const $ = (id) => document.getElementById(id);
const make = (tag, fields = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...inside);
  return element;
};
let session = null, order = [], players = [], began = 0;

// Keeping and sending

function keep() {
  try {
    localStorage.setItem(KEEP, JSON.stringify(session));
  } catch {
    say("This browser keeps nothing: do not close the page before the end.");
  }
}

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(KEEP));
    return found && found.build === DATA.build && Array.isArray(found.answers) ? found : null;
  } catch {
    return null;
  }
}

async function post(path, body) {
  const sent = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (!sent.ok) throw new Error((await sent.text()).slice(0, 200));
  return sent.json();
}

async function send() {
  if (!SERVED) return false;
  try {
    return (await post("ratings", JSON.stringify(session))).saved >= session.answers.length;
  } catch {
    return false; // the next answer sends all of them again
  }
}

// A listener's own order, the same after a reload: parts in turn, trials shuffled (mulberry32) by the number

function shuffled(trials, seed) {
  const random = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const list = [...trials];
  for (let i = list.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [list[i], list[j]] = [list[j], list[i]];
  }
  return list;
}

function ordered(listener) {
  const own = DATA.groups[(listener - 1) % DATA.groups.length];
  return Object.keys(PARTS).flatMap((part) => shuffled(own.filter((trial) => trial.part === part), listener));
}

// Screens

function show(id) {
  for (const section of document.querySelectorAll("section")) section.hidden = section.id !== id;
  $(id).querySelector("h1").focus();
  window.scrollTo(0, 0);
}

function say(text) {
  $("status").textContent = text;
}

function next() {
  players.forEach((player) => player.audio.pause());
  if (session.answers.length >= order.length) return finish();
  const done = session.answers.length, trial = order[done], part = PARTS[trial.part];
  const number = Object.keys(PARTS).indexOf(trial.part) + 1;
  $("place").textContent = `Question ${done + 1} of ${order.length}, part ${number} of 3: ${part.name}`;
  $("progress").max = order.length;
  $("progress").value = done;
  $("question").textContent = part.question;
  $("explain").textContent = part.explain;
  $("legend").textContent = "Your answer";
  players = trial.clips.map((name, i) => player(name, part.clips[i], part.keys[i]));
  $("clips").replaceChildren(...players.map((each) => each.button));
  $("choices").replaceChildren(...part.choices.map(([value, text]) =>
    make("label", {}, make("input", { type: "radio", name: "value", value }),
      make("span", {}, typeof value === "number" ? `${value}  ${text}` : text))));
  const keys = [...part.keys.map((key) => key.toUpperCase()), part.choices.length > 2 ? "1 to 5" : "1 and 2", "Enter"];
  $("keys").replaceChildren("Keys: ", ...keys.flatMap((key) => [make("kbd", { textContent: key }), " "]),
    `(play ${part.clips.join(", ")}; answer; next)`);
  $("scale").disabled = $("next").disabled = true;
  began = performance.now();
  show("trial");
}

function player(name, label, key) {
  const audio = new Audio("audio/" + name), state = make("small", { textContent: "not heard yet" });
  const button = make("button", { type: "button" }, make("span", { textContent: `▶ ${label}` }), state);
  const made = { audio, button, key, plays: 0, heard: false };
  audio.preload = "auto";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => play(made));
  audio.addEventListener("ended", () => {
    made.heard = true;
    made.plays += 1;
    button.classList.add("heard");
    state.textContent = "heard";
    if (players.includes(made) && players.every((each) => each.heard) && $("scale").disabled) {
      $("scale").disabled = false;
      say("The answers are open.");
    }
  });
  for (const event of ["play", "pause", "ended"]) {
    audio.addEventListener(event, () => button.setAttribute("aria-pressed", String(!audio.paused && !audio.ended)));
  }
  audio.addEventListener("error", () => failed(made));
  return made;
}

async function play(chosen) {
  players.filter((each) => each !== chosen).forEach((each) => each.audio.pause());
  if (chosen.audio.error) chosen.audio.load(); // once more
  chosen.audio.currentTime = 0;
  say("");
  try {
    await chosen.audio.play();
  } catch (error) {
    if (error.name !== "AbortError") failed(chosen);
  }
}

function failed(made) {
  if (players.includes(made)) say("A sample could not be loaded. Check the connection and play it again.");
}

async function answered(event) {
  event.preventDefault();
  const chosen = document.querySelector("input[name=value]:checked");
  if ($("scale").disabled || !chosen) return;
  const trial = order[session.answers.length];
  session.answers.push({
    trial: trial.id,
    value: trial.part === "ABX" ? chosen.value : Number(chosen.value),
    seconds: Math.round((performance.now() - began) / 100) / 10,
    plays: players.map((each) => each.plays),
  });
  session.finished = session.answers.length === order.length;
  keep();
  say("");
  next();
  if (!session.finished) send();
}

async function finish() {
  const text = JSON.stringify(session, null, 1) + "\n";
  $("download").href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  $("download").download = `ratings-${DATA.build}-${session.listener}.json`;
  $("sent").textContent = SERVED ? "Sending your ratings ..." : "";
  show("end");
  $("sent").textContent = (await send()) ? "Your ratings are saved: you may close the page." :
    "Please download the ratings, and send the file to whoever runs the test.";
}

function begin(listener) {
  order = ordered(listener);
  next();
}

$("begin").addEventListener("submit", async (event) => {
  event.preventDefault();
  let text = $("number").value.trim();
  if ($("numbered").hidden) {
    try {
      text = String((await post("listener", "{}")).listener);
    } catch {
      $("numbered").hidden = false; // the server is gone: the number is typed in
    }
  }
  const listener = /^[1-9]\d{0,5}$/.test(text) ? Number(text) : 0;
  $("number").setAttribute("aria-invalid", String(!listener));
  $("number-error").textContent = listener ? "" : "Give a whole number from 1 to 999999.";
  if (!listener) return $("number").focus();
  const random = crypto.getRandomValues(new Uint8Array(16));
  session = {
    format: DATA.format, build: DATA.build, listener, started: new Date().toISOString(), finished: false,
    session: [...random].map((byte) => byte.toString(16).padStart(2, "0")).join(""), answers: [],
  };
  keep();
  begin(listener);
});
$("answer").addEventListener("submit", answered);
$("choices").addEventListener("change", () => ($("next").disabled = false));
$("volume").addEventListener("click", () => {
  players = [player(DATA.groups[0].find((trial) => trial.part === "SIM").clips[0], "Test sound", "")];
  play(players[0]);
});
$("again").addEventListener("click", () => {
  if (!confirm("Have the ratings been saved or downloaded? They are removed from this browser.")) return;
  localStorage.removeItem(KEEP);
  location.reload();
});
document.addEventListener("keydown", (event) => {
  if ($("trial").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const pressed = players.find((each) => each.key === event.key.toLowerCase());
  if (pressed) return void play(pressed);
  const choices = [...document.querySelectorAll("input[name=value]")], wanted = Number(event.key);
  const chosen = choices.length > 2 ? choices.find((each) => Number(each.value) === wanted) : choices[wanted - 1];
  if (chosen && !$("scale").disabled) {
    chosen.checked = true;
    chosen.focus();
    $("next").disabled = false;
  } else if (event.key === "Enter" && event.target.tagName !== "BUTTON") {
    event.preventDefault();
    if (!$("next").disabled) $("answer").requestSubmit();
  }
});

async function open() {
  $("minutes").textContent = Math.ceil(DATA.groups[0].reduce((sum, t) => sum + 4 + 6 * t.clips.length, 0) / 60);
  session = kept();
  if (session) {
    begin(session.listener);
    return say(session.finished ? "" : `Welcome back: ${session.answers.length} of ${order.length} are answered.`);
  }
  const server = SERVED && (await fetch("listener").catch(() => null));
  $("numbered").hidden = Boolean(server && server.ok); // ours gives the numbers
}
open();
