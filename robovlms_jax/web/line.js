"use strict";
// A page's line to its program (web/server.py): one websocket, opened again whenever it is lost. web/pages.py puts this before the page's own script.
const $ = id => document.getElementById(id);
const SILENT_MS = 3000, GIVEN_UP_MS = 12000;
let socket = null, pause = 500, ended = false, heard = 0, silent = false, arrived = 0;

function linked() { return socket !== null && socket.readyState === 1; }
function send(message) { if (linked()) socket.send(JSON.stringify(message)); }

// ears: tell(message): JSON came. show(facts, pictures): a message with pictures came, [name, ImageBitmap] each; the page closes them.
// lost(): the line is lost; `ended`: because the program has ended. opened(), optional. acknowledges: every message with pictures is answered.
// steady(), hush(silent), optional: whether messages should come all the time now, and that none has come for SILENT_MS, or one has again.
function connect(ears) {
  const mine = new WebSocket((location.protocol === "https:" ? "wss://" : "ws://") + location.host + "/live" + location.search);
  const over = () => {
    if (socket !== mine) return;  // given up before it knew
    socket = null; silent = false; ears.lost();
    setTimeout(connect, pause, ears); pause = Math.min(pause * 2, 5000);
  };
  socket = mine; heard = performance.now(); silent = false;
  mine.binaryType = "arraybuffer";
  mine.onopen = () => { pause = 500; ended = false; heard = performance.now(); if (ears.opened) ears.opened(); };
  mine.onmessage = event => {
    if (socket !== mine) return;
    heard = performance.now();
    if (silent) { silent = false; ears.hush(false); }
    if (typeof event.data !== "string") unpack(event.data, ears);
    else { const message = JSON.parse(event.data); if (message.type === "ended") ended = true; ears.tell(message); }
  };
  mine.onclose = over;
  clearInterval(connect.watch);
  connect.watch = setInterval(() => {
    if (!linked() || !ears.steady || !ears.steady()) heard = performance.now();
    const age = performance.now() - heard;
    if (age > SILENT_MS && !silent) { silent = true; ears.hush(true); }
    if (age > GIVEN_UP_MS) { over(); mine.close(); }
  }, 500);
}

async function unpack(data, ears) {
  const number = ++arrived, length = new DataView(data).getUint32(0, true);
  const facts = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let at = 4 + length;
  const coming = facts.pictures.map(([name, size]) => {
    const picture = createImageBitmap(new Blob([new Uint8Array(data, at, size)], {type: "image/jpeg"}));
    at += size; return picture.then(x => [name, x]);
  });
  try {
    const pictures = await Promise.all(coming);
    if (number === arrived && linked()) ears.show(facts, pictures);
    else pictures.forEach(([, picture]) => picture.close());  // a newer message has come meanwhile
  } finally { if (ears.acknowledges) send({type: "ack"}); }
}

// Pictures of a live page, each onto the canvas of its name.
function paint(pictures) {
  for (const [name, picture] of pictures) {
    const board = $(name);
    if (board.width !== picture.width) board.width = board.height = picture.width;
    board.getContext("2d").drawImage(picture, 0, 0); picture.close();
  }
}
