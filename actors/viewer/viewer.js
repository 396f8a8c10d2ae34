// Shows the points of the page. Coordinates are those of the reference camera: x right, y down, z ahead, metres.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const canvas = element("canvas");

  // -- data ---------------------------------------------------------------------------------------------------

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  function unpack(group) {
    const steps = new DataView(bytes(group.positions).buffer);
    const positions = new Float32Array(3 * group.count);
    for (let i = 0; i < positions.length; i++) {
      const axis = i % 3;
      positions[i] = group.corner[axis] + (steps.getUint16(2 * i, true) / 65535) * group.side[axis];
    }
    return {
      kind: group.kind, count: group.count, positions,
      colours: bytes(group.colours), confidences: bytes(group.confidences),
    };
  }

  const groups = data.groups.map(unpack);
  const cameras = [data.reference, ...data.views].map((view) => ({ pose: view.pose, corners: view.corners }));
  const CAMERA_COLOURS = [[240, 180, 60], [90, 190, 255]];

  const ratio = Math.log(data.confidence.high / data.confidence.low);
  const toStep = (value) => Math.ceil((255 * Math.log(Math.max(value, data.confidence.low) / data.confidence.low)) / ratio);
  const toConfidence = (step) => data.confidence.low * Math.exp((step / 255) * ratio);

  // -- what is shown ------------------------------------------------------------------------------------------

  // A start above the largest confidence would show nothing: everything is shown instead.
  const start = toStep(data.confidence.start);
  const state = {
    view: 0, size: 1, threshold: start > 255 ? 0 : start,
    reference: true, target: true, cameras: true, turning: false, playing: false,
  };

  function median(values) {
    if (!values.length) return 0;
    values.sort((a, b) => a - b);
    return values[values.length >> 1];
  }

  function centreOf() {
    const axes = [[], [], []];
    for (const group of groups.slice(0, 2)) {
      const skip = Math.max(1, Math.floor(group.count / 5000));
      for (let i = 0; i < group.count; i += skip)
        for (let axis = 0; axis < 3; axis++) axes[axis].push(group.positions[3 * i + axis]);
    }
    const centre = axes.map((values) => median(values.slice()));
    const spread = median(axes[0].map((_, i) => Math.hypot(...axes.map((values, axis) => values[i] - centre[axis]))));
    return { centre, spread: Math.max(spread, 1e-3) };
  }

  const home = centreOf();
  const eye = { yaw: 0, pitch: 0, distance: 1, centre: [0, 0, 1], fov: 50 };

  function reset() {
    const far = Math.hypot(...home.centre);
    Object.assign(eye, {
      yaw: 0.35, pitch: -0.25, fov: 50, centre: home.centre.slice(),
      distance: Math.max(3 * home.spread, 1.5 * far, 1e-2),
    });
  }

  // Looks from a camera along its axis; its roll is left out.
  function lookFrom(camera) {
    const axis = [0, 1, 2].map((row) => camera.pose[row][2]);
    const place = [0, 1, 2].map((row) => camera.pose[row][3]);
    const distance = Math.max(Math.hypot(...home.centre.map((value, i) => value - place[i])), 0.05);
    const heights = camera.corners.map((corner) => corner[1]);
    Object.assign(eye, {
      yaw: Math.atan2(axis[0], axis[2]), pitch: Math.asin(Math.max(-1, Math.min(1, -axis[1]))), distance,
      centre: place.map((value, i) => value + axis[i] * distance),
      fov: (2 * Math.atan(Math.max(...heights.map(Math.abs))) * 180) / Math.PI,
    });
  }

  // Rows of the world-to-eye rotation, and where the eye is: x right, y up, z towards the viewer.
  function eyeFrame() {
    const [sy, cy, sp, cp] = [Math.sin(eye.yaw), Math.cos(eye.yaw), Math.sin(eye.pitch), Math.cos(eye.pitch)];
    const forward = [sy * cp, -sp, cy * cp];
    const right = [cy, 0, -sy];
    const up = [
      right[1] * forward[2] - right[2] * forward[1],
      right[2] * forward[0] - right[0] * forward[2],
      right[0] * forward[1] - right[1] * forward[0],
    ];
    const place = eye.centre.map((value, i) => value - forward[i] * eye.distance);
    return { forward, right, up, place };
  }

  // Pixels a unit of direction: the field of view is that of the shorter side, so that tall windows show as much.
  const focalOf = (width, height) => Math.min(width, height) / (2 * Math.tan((eye.fov * Math.PI) / 360));

  const isShown = (index) => (index === 0 ? state.reference : state.target && index === state.view + 1);

  // Ends of the lines of a camera: its corners at a depth that suits the scene, and its centre.
  function cameraLines(camera) {
    const depth = 0.18 * home.spread;
    const world = (point) =>
      [0, 1, 2].map((row) => camera.pose[row].slice(0, 3).reduce((sum, value, i) => sum + value * point[i], camera.pose[row][3]));
    const corners = camera.corners.map((corner) => world(corner.map((value) => value * depth)));
    const centre = world([0, 0, 0]);
    return corners.flatMap((corner, i) => [centre, corner, corner, corners[(i + 1) % 4]]);
  }

  const shownCameras = () => (state.cameras ? [[0, cameras[0]], [1, cameras[state.view + 1]]] : []);

  // -- WebGL --------------------------------------------------------------------------------------------------

  const VERTEX = `
    attribute vec3 position; attribute vec3 colour; attribute float confidence;
    uniform mat4 matrix; uniform float size; uniform float threshold; varying vec3 tint;
    void main() {
      gl_Position = matrix * vec4(position, 1.0);
      gl_PointSize = clamp(size / gl_Position.w, 1.0, 64.0);
      if (confidence < threshold) gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
      tint = colour;
    }`;
  const FRAGMENT = `
    precision mediump float; uniform bool isRound; varying vec3 tint;
    void main() {
      if (isRound) { vec2 place = gl_PointCoord - 0.5; if (dot(place, place) > 0.25) discard; }
      gl_FragColor = vec4(tint, 1.0);
    }`;

  function webgl() {
    const gl = canvas.getContext("webgl", { antialias: true, preserveDrawingBuffer: true });
    if (!gl) return null;
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return null;
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    gl.clearColor(0.09, 0.11, 0.141, 1);
    const at = Object.fromEntries(["position", "colour", "confidence"].map((name) => [name, gl.getAttribLocation(program, name)]));
    const uniform = Object.fromEntries(
      ["matrix", "size", "threshold", "isRound"].map((name) => [name, gl.getUniformLocation(program, name)]));
    const filled = (array) => {
      const buffer = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
      return buffer;
    };
    const buffers = groups.map((group) => ({
      position: filled(group.positions), colour: filled(group.colours), confidence: filled(group.confidences),
    }));
    const lines = gl.createBuffer();
    const bind = (name, buffer, number, type, scaled) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.enableVertexAttribArray(at[name]);
      gl.vertexAttribPointer(at[name], number, type, scaled, 0, 0);
    };

    function matrix() {
      const { forward, right, up, place } = eyeFrame();
      const near = eye.distance / 200, far = eye.distance * 60;
      const focal = 2 * focalOf(canvas.width, canvas.height);
      const rows = [right, up, forward.map((value) => -value)];
      const view = rows.map((row) => [...row, -row.reduce((sum, value, i) => sum + value * place[i], 0)]);
      const [a, b] = [(far + near) / (near - far), (2 * far * near) / (near - far)];
      const columns = [];
      for (let column = 0; column < 4; column++) {
        const w = column === 3 ? 1 : 0;
        columns.push((focal / canvas.width) * view[0][column], (focal / canvas.height) * view[1][column], a * view[2][column] + b * w, -view[2][column]);
      }
      return new Float32Array(columns);
    }

    return {
      name: "webgl",
      draw() {
        gl.viewport(0, 0, canvas.width, canvas.height);
        gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
        gl.uniformMatrix4fv(uniform.matrix, false, matrix());
        gl.uniform1f(uniform.size, pointSize());
        gl.uniform1f(uniform.threshold, (state.threshold - 0.5) / 255);
        gl.uniform1i(uniform.isRound, 1);
        groups.forEach((group, index) => {
          if (!isShown(index) || !group.count) return;
          bind("position", buffers[index].position, 3, gl.FLOAT, false);
          bind("colour", buffers[index].colour, 3, gl.UNSIGNED_BYTE, true);
          bind("confidence", buffers[index].confidence, 1, gl.UNSIGNED_BYTE, true);
          gl.drawArrays(gl.POINTS, 0, group.count);
        });
        gl.uniform1i(uniform.isRound, 0);
        for (const [kind, camera] of shownCameras()) {
          const ends = new Float32Array(cameraLines(camera).flat());
          gl.bindBuffer(gl.ARRAY_BUFFER, lines);
          gl.bufferData(gl.ARRAY_BUFFER, ends, gl.DYNAMIC_DRAW);
          bind("position", lines, 3, gl.FLOAT, false);
          gl.disableVertexAttribArray(at.colour);
          gl.disableVertexAttribArray(at.confidence);
          gl.vertexAttrib3f(at.colour, ...CAMERA_COLOURS[kind].map((value) => value / 255));
          gl.vertexAttrib1f(at.confidence, 1);
          gl.drawArrays(gl.LINES, 0, ends.length / 3);
        }
      },
    };
  }

  // Pixels times metres: a point one metre away covers so many pixels, about as far apart as the points are.
  function pointSize() {
    const shown = groups.slice(0, 2).map((group) => group.count);
    const spacing = (2 * Math.hypot(...home.centre)) / Math.sqrt(Math.max(...shown, 1));
    return state.size * spacing * focalOf(canvas.width, canvas.height);
  }

  // -- without WebGL: the same picture, point by point --------------------------------------------------------

  function plain() {
    const context = canvas.getContext("2d");
    let pixels = null, depths = null;

    function project(point, frame, focal) {
      const offset = point.map((value, i) => value - frame.place[i]);
      const along = (axis) => axis[0] * offset[0] + axis[1] * offset[1] + axis[2] * offset[2];
      const z = along(frame.forward);
      return [canvas.width / 2 + (focal * along(frame.right)) / z, canvas.height / 2 - (focal * along(frame.up)) / z, z];
    }

    function splat(group, frame, focal, size) {
      const { right, up, forward, place } = frame;
      const { width, height } = canvas;
      for (let i = 0; i < group.count; i++) {
        if (group.confidences[i] < state.threshold) continue;
        const dx = group.positions[3 * i] - place[0], dy = group.positions[3 * i + 1] - place[1];
        const dz = group.positions[3 * i + 2] - place[2];
        const z = forward[0] * dx + forward[1] * dy + forward[2] * dz;
        if (z <= eye.distance / 200) continue;
        const x = width / 2 + (focal * (right[0] * dx + right[1] * dy + right[2] * dz)) / z;
        const y = height / 2 - (focal * (up[0] * dx + up[1] * dy + up[2] * dz)) / z;
        const side = Math.max(1, Math.min(64, size / z));
        const left = Math.max(0, Math.round(x - side / 2)), top = Math.max(0, Math.round(y - side / 2));
        const colour = 0xff000000 | (group.colours[3 * i + 2] << 16) | (group.colours[3 * i + 1] << 8) | group.colours[3 * i];
        for (let row = top; row < Math.min(height, top + side); row++)
          for (let column = left; column < Math.min(width, left + side); column++) {
            const at = row * width + column;
            if (z < depths[at]) { depths[at] = z; pixels[at] = colour; }
          }
      }
    }

    return {
      name: "2d",
      draw() {
        const image = context.createImageData(canvas.width, canvas.height);
        pixels = new Uint32Array(image.data.buffer).fill(0xff241c17);
        depths = new Float32Array(pixels.length).fill(Infinity);
        const frame = eyeFrame(), focal = focalOf(canvas.width, canvas.height);
        groups.forEach((group, index) => { if (isShown(index)) splat(group, frame, focal, pointSize()); });
        context.putImageData(image, 0, 0);
        for (const [kind, camera] of shownCameras()) {
          const ends = cameraLines(camera).map((point) => project(point, frame, focal));
          context.strokeStyle = `rgb(${CAMERA_COLOURS[kind]})`;
          context.beginPath();
          for (let i = 0; i < ends.length; i += 2) {
            if (ends[i][2] <= 0 || ends[i + 1][2] <= 0) continue;
            context.moveTo(ends[i][0], ends[i][1]);
            context.lineTo(ends[i + 1][0], ends[i + 1][1]);
          }
          context.stroke();
        }
      },
    };
  }

  // -- drawing when something changed -------------------------------------------------------------------------

  reset();
  const renderer = webgl() || plain();
  document.body.dataset.renderer = renderer.name;
  if (renderer.name === "2d") element("renderer").textContent = "This browser gives no WebGL; the points are drawn without it.";
  let waiting = false;
  const redraw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; fit(); renderer.draw(); });
  };

  function fit() {
    const scale = renderer.name === "webgl" ? Math.min(window.devicePixelRatio || 1, 2) : 1;
    const [width, height] = [Math.round(canvas.clientWidth * scale), Math.round(canvas.clientHeight * scale)];
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  }

  // -- beside -------------------------------------------------------------------------------------------------

  function fill(target, pictures) {
    target.replaceChildren(...pictures.map((picture) => {
      const figure = document.createElement("figure");
      const image = document.createElement("img");
      image.src = picture.src;
      image.alt = picture.title;
      const caption = document.createElement("figcaption");
      caption.textContent = picture.title;
      figure.append(image, caption);
      return figure;
    }));
  }

  function show(index) {
    state.view = index;
    const view = data.views[index];
    fill(element("view-pictures"), view.pictures);
    element("facts").replaceChildren(...view.facts.flatMap(([name, value]) => {
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      text.textContent = value;
      return [term, text];
    }));
    if (element("view")) {
      element("view").value = index;
      element("view-name").textContent = `${view.name} (${index + 1} of ${data.views.length})`;
    }
    update();
  }

  function update() {
    element("confidence").value = state.threshold;
    element("confidence-value").textContent = toConfidence(state.threshold).toFixed(2);
    element("size-value").textContent = `× ${state.size.toFixed(2)}`;
    const number = (index) => groups[index].confidences.reduce((sum, value) => sum + (value >= state.threshold), 0);
    const every = data.stride > 1 ? ` (every ${data.stride}th point)` : "";
    element("counts").textContent =
      `${number(0).toLocaleString("en")} points of the reference, ` +
      `${number(state.view + 1).toLocaleString("en")} imagined${every}`;
    redraw();
  }

  fill(element("reference-pictures"), data.reference.pictures);

  // -- hands --------------------------------------------------------------------------------------------------

  const fingers = new Map();
  const stop = () => { if (state.turning) toggleTurn(); };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    stop();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    if (fingers.size === 2) {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const apart = (place) => Math.max(1, Math.hypot(place[0] - other[0], place[1] - other[1]));
      eye.distance *= apart(before) / apart(now);
      move(dx / 2, dy / 2);
    } else if (event.shiftKey || event.buttons & 6) {
      move(dx, dy);
    } else {
      turn(dx * 0.006, dy * 0.006);
    }
    fingers.set(event.pointerId, now);
    redraw();
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    eye.distance *= Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.003);
    redraw();
  }, { passive: false });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", () => { reset(); redraw(); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-0.08, 0], ArrowRight: [0.08, 0], ArrowUp: [0, -0.08], ArrowDown: [0, 0.08] }[event.key];
    if (step) turn(...step);
    else if (event.key === "+") eye.distance *= 0.9;
    else if (event.key === "-") eye.distance *= 1.1;
    else return;
    event.preventDefault();
    redraw();
  });

  function turn(right, down) {
    eye.yaw += right;
    eye.pitch = Math.max(-1.5, Math.min(1.5, eye.pitch - down));
  }

  function move(dx, dy) {
    const { right, up } = eyeFrame();
    const metres = eye.distance / focalOf(canvas.clientWidth, canvas.clientHeight);
    eye.centre = eye.centre.map((value, i) => value + (-dx * right[i] + dy * up[i]) * metres);
  }

  function toggleTurn() {
    state.turning = !state.turning;
    element("turn").setAttribute("aria-pressed", state.turning);
    let last = performance.now();
    const tick = (now) => {
      if (!state.turning) return;
      turn((now - last) * 0.0004, 0);
      last = now;
      redraw();
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  const bindInput = (id, change) => {
    if (element(id)) element(id).addEventListener("input", () => { change(element(id)); update(); });
  };
  bindInput("confidence", (input) => { state.threshold = Number(input.value); });
  bindInput("size", (input) => { state.size = Number(input.value); });
  for (const name of ["reference", "target", "cameras"])
    bindInput(`show-${name}`, (input) => { state[name] = input.checked; });
  const bindClick = (id, act) => element(id) && element(id).addEventListener("click", act);
  bindClick("turn", toggleTurn);
  bindClick("reset", () => { stop(); reset(); redraw(); });
  bindClick("from-reference", () => { stop(); lookFrom(cameras[0]); redraw(); });
  bindClick("from-target", () => { stop(); lookFrom(cameras[state.view + 1]); redraw(); });
  if (element("view")) {
    element("view").max = data.views.length - 1;
    element("view").addEventListener("input", () => show(Number(element("view").value)));
  }
  bindClick("play", () => {
    state.playing = !state.playing;
    element("play").textContent = state.playing ? "Pause" : "Play";
    const next = () => {
      if (!state.playing) return;
      show((state.view + 1) % data.views.length);
      setTimeout(next, 180);
    };
    next();
  });
  window.addEventListener("resize", redraw);
  show(0);
})();
