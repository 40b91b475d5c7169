// The field of a video model of EqM/models.py, and the descent along it. It runs in a worker of descent.html, and with
// world.js in one of world.html.
//
// Clips are (C, T, H, W), matrices have a row per token, all of them float32 in one memory. A weight is packed:
// 8 outputs form a panel, which holds 8 adjacent values for each input. The kernel (descent.wat, or the fallback
// here) multiplies 4 rows by a panel at a time, so rows are padded to multiples of 4, and columns of results to
// multiples of 8.
"use strict";

const REFERENCE_FPS = 25;
const FEATURES = 256;
const EPS = 1e-6;
const PAGE = 1 << 14;  // floats in a page of WebAssembly
const f32 = Math.fround;
const up = (count, unit) => Math.ceil(count / unit) * unit;
const silu = value => value / (1 + Math.exp(-value));

// Memory and kernels -----------------------------------------------------------------------------------

class Memory {  // places are counted in floats
  constructor(wasm) {
    this.top = 0;
    this.wasm = wasm && new WebAssembly.Memory({initial: 1});
    this.floats = new Float32Array(wasm ? this.wasm.buffer : PAGE);
  }

  take(count) {  // zeros; may replace `floats`
    const place = this.top;
    this.top += up(count, 4);
    if (this.top > this.floats.length) this.grow(Math.ceil((this.top - this.floats.length) / PAGE));
    this.floats.fill(0, place, this.top);
    return place;
  }

  grow(pages) {
    if (this.wasm) {
      this.wasm.grow(pages);
      this.floats = new Float32Array(this.wasm.buffer);
      return;
    }
    const old = this.floats;
    this.floats = new Float32Array(old.length + pages * PAGE);
    this.floats.set(old);
  }
}

function compiledKernel(bytes) {
  const memory = new Memory(true);
  const imports = {env: {memory: memory.wasm}};
  const {exports} = new WebAssembly.Instance(new WebAssembly.Module(bytes), imports);
  return {
    memory,
    name: "wasm",
    matmul: (a, lda, b, c, ldc, m, k, n, bias) =>
      exports.matmul(4 * a, 4 * lda, 4 * b, 4 * c, 4 * ldc, m, 32 * k, n, 4 * bias),
    softmax: (place, rows, columns) => exports.softmax(4 * place, rows, 4 * columns),
    gelu: (place, count) => exports.gelu(4 * place, 4 * count),
  };
}

function plainKernel() {
  const memory = new Memory(false);
  return {
    memory,
    name: "plain",

    // C (m, n) = A (m, k) B + bias, with row strides lda and ldc; B is packed.
    matmul(a, lda, b, c, ldc, m, k, n, bias) {
      for (let column = 0; column < n; column += 4) {
        const panel = b + (column >> 3) * 8 * k + (column & 4);
        for (let row = 0; row < m; row += 2)
          multiplyTile(memory.floats, a + row * lda, lda, panel, k, c + row * ldc + column, ldc, bias + column);
      }
    },

    softmax(place, rows, columns) {
      const data = memory.floats;
      for (let row = place; row < place + rows * columns; row += columns) {
        const end = row + columns;
        let most = -Infinity;
        let sum = 0;
        for (let at = row; at < end; at++) most = Math.max(most, data[at]);
        for (let at = row; at < end; at++) sum += data[at] = Math.exp(data[at] - most);
        for (let at = row; at < end; at++) data[at] /= sum;
      }
    },

    gelu(place, count) {  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
      const data = memory.floats;
      const factor = -2 * Math.sqrt(2 / Math.PI);
      for (let at = place; at < place + count; at++) {
        const x = data[at];
        data[at] = x / (1 + Math.exp(factor * (x + 0.044715 * x * x * x)));
      }
    },
  };
}

// Two rows and four columns of a product. The sums are variables of their own, which is fast.
function multiplyTile(data, a, lda, panel, k, out, ldc, bias) {
  let p = a;
  let q = a + lda;
  let s0 = data[bias], s1 = data[bias + 1], s2 = data[bias + 2], s3 = data[bias + 3];
  let t0 = s0, t1 = s1, t2 = s2, t3 = s3;
  for (let at = panel; at < panel + 8 * k; at += 8) {
    const x = data[p++];
    const y = data[q++];
    const b0 = data[at], b1 = data[at + 1], b2 = data[at + 2], b3 = data[at + 3];
    s0 += x * b0; s1 += x * b1; s2 += x * b2; s3 += x * b3;
    t0 += y * b0; t1 += y * b1; t2 += y * b2; t3 += y * b3;
  }
  const next = out + ldc;
  data[out] = s0; data[out + 1] = s1; data[out + 2] = s2; data[out + 3] = s3;
  data[next] = t0; data[next + 1] = t1; data[next + 2] = t2; data[next + 3] = t3;
}

// Positions --------------------------------------------------------------------------------------------

// As position_table of EqM/models.py: (N, D), or with rotary positions (H W, D).
function positionTable(model) {
  const D = model.hidden_size;
  const side = model.input_size / model.patch_size;
  const frames = model.use_rope ? 1 : Math.ceil(model.num_frames / model.temporal_patch_size);
  const isFlat = model.use_rope || (model.num_frames === 1 && model.temporal_patch_size === 1);
  const half = isFlat ? D >> 2 : Math.floor(D / 6);
  const table = new Float32Array(frames * side * side * D);
  for (let n = 0; n < frames * side * side; n++) {
    const t = Math.floor(n / side / side);
    const y = Math.floor(n / side) % side;
    const x = n % side;
    (isFlat ? [x, y] : [t, y, x]).forEach((place, axis) => {
      for (let j = 0; j < half; j++) {
        const angle = place * 10000 ** (-j / half);
        const at = n * D + axis * 2 * half + j;
        table[at] = Math.sin(angle);
        table[at + half] = Math.cos(angle);
      }
    });
  }
  return table;
}

// As RotaryEmbedding3D of EqM/rope.py: cos and sin of the angles, each (N, d / 2), of temporal patches from `begin` on.
// Only differences of angles count, which must be exact after any number of patches. So angles have double precision.
function rotaryAngles(model, [T, H, W], timeScale, begin) {
  const d = model.hidden_size / model.num_heads;
  const third = 2 * Math.floor(d / 6);
  const split = model.rope_split ? model.rope_split.split(",").map(Number) : [third, third, third];
  const cos = new Float32Array(T * H * W * d / 2).fill(1);
  const sin = new Float32Array(cos.length);
  const unit = f32(REFERENCE_FPS * f32(timeScale));
  const speed = f32(model.rope_speed);
  let first = 0;
  split.forEach((channels, axis) => {
    const count = channels / 2;
    const moving = axis && speed ? Math.floor(count / 3) * 3 : 0;
    for (let j = 0; j < count; j++) {
      const exponent = j < moving ? Math.floor(j / 3) : j - moving * 2 / 3;
      const frequency = f32(model.rope_theta ** -f32(exponent / count));
      const ownSpeed = j < moving ? [0, speed, -speed][j % 3] : 0;
      for (let n = 0; n < T * H * W; n++) {
        const time = (begin + Math.floor(n / W / H)) * unit;
        const index = axis === 1 ? Math.floor(n / W) % H : n % W;
        const angle = (axis ? index + ownSpeed * time : time) * frequency;
        const at = n * d / 2 + first + j;
        cos[at] = Math.cos(angle);
        sin[at] = Math.sin(angle);
      }
    }
    first += count;
  });
  return {cos, sin};
}

// The network ------------------------------------------------------------------------------------------

class Network {
  // model: the fields of EqMConfig. shapes: [name, shape] of each tensor in `bytes`, float16 one after another.
  constructor(model, shapes, bytes, kernel) {
    this.model = model;
    this.kernel = kernel;
    this.memory = kernel.memory;
    this.weights = {};
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    let offset = 0;
    for (const [name, shape] of shapes) {
      const values = new Float32Array(shape.reduce((a, b) => a * b));
      for (let at = 0; at < values.length; at++) {
        values[at] = fromHalf(view.getUint16(offset, true));
        offset += 2;
      }
      const isMatrix = shape.length > 1 && !name.startsWith("y_embedder");
      this.weights[name] = isMatrix ? this.packed(values, shape[0]) : this.kept(values);
    }
    if (!model.use_rope || model.position_table === "space") this.table = positionTable(model);
    this.end = this.memory.top;
  }

  kept(values) {
    const place = this.memory.take(up(values.length, 8));
    this.memory.floats.set(values, place);
    return place;
  }

  packed(values, n) {
    const k = values.length / n;
    const place = this.memory.take(up(n, 8) * k);
    pack(values, 0, k, 1, n, k, this.memory.floats, place);
    return place;
  }

  // Memory for the keys and values of so many tokens in a head
  keysAndValues(tokens) {
    const d = this.model.hidden_size / this.model.num_heads;
    return {
      keys: this.memory.take(up(tokens, 8) * d),
      values: this.memory.take(up(d, 8) * tokens),
      tokens,
    };
  }

  // to = from W + b for the layer `name`, of so many rows, inputs and outputs
  linear(name, from, inputs, to, outputs, rows) {
    const weight = this.weights[`${name}.weight`];
    const bias = this.weights[`${name}.bias`];
    const width = up(outputs, 8);
    this.kernel.matmul(from, up(inputs, 8), weight, to, width, up(rows, 4), inputs, width, bias);
  }

  grid(numFrames) {
    const side = this.model.input_size / this.model.patch_size;
    return [Math.ceil(numFrames / this.model.temporal_patch_size), side, side];
  }

  // Take memory for clips of N tokens, which see `seen` tokens. Its places stay valid until N changes.
  prepare(N, seen) {
    if (this.N === N) return this.places;
    const D = this.model.hidden_size;
    const d = D / this.model.num_heads;
    const rows = up(N, 4);
    const width = up(D, 8);
    const sizes = {
      tokens: rows * width,
      normed: rows * width,
      branch: rows * width,
      wide: rows * up(Math.max(4 * D, this.values), 8),
      q: rows * d,
      scores: rows * up(seen, 8),
      head: rows * up(d, 8),
      none: up(Math.max(seen, d), 8),
      features: 4 * FEATURES,
      condition: 4 * width,
      hidden: 4 * width,
      modulation: 4 * up(6 * D, 8),
    };
    this.memory.top = this.end;
    this.N = undefined;  // the memory may be exhausted
    this.places = {};
    for (const [name, count] of Object.entries(sizes)) this.places[name] = this.memory.take(count);
    this.places.clip = this.keysAndValues(N);  // of one head after another
    this.N = N;
    return this.places;
  }

  get values() {  // in a token
    const {temporal_patch_size: pt, patch_size: p, in_channels: C} = this.model;
    return pt * p * p * C;
  }

  check(x, label, action, T) {
    const {in_channels: C, input_size: S, num_classes: classes} = this.model;
    const actions = this.model.actions ? this.model.actions.split(",").length : 0;
    if (!(Number.isInteger(T) && T > 0)) throw new Error(`numFrames ${T}; expected an integer from 1 on`);
    if (x.length !== C * T * S * S)
      throw new Error(`x has ${x.length} values; expected ${C} x ${T} x ${S} x ${S}`);
    for (const [name, value, count] of [["label", label, classes], ["action", action, actions]]) {
      const isKnown = Number.isInteger(value) && value >= 0 && value < count;
      if (value !== null && !isKnown)
        throw new Error(`${name} ${value}; expected null or an integer from 0 to ${count - 1}`);
    }
  }

  // The field (C, T, H, W) at a clip x of this shape; label, action null: none; timeScale: seconds per frame. cache: the
  // Cache of a causal model, where x is the next temporal patch.
  field(x, {label = null, action = null, numFrames: T, timeScale, cache = null}) {
    this.check(x, label, action, T);
    const {in_channels: C, hidden_size: D} = this.model;
    const grid = this.grid(T);
    const N = grid[0] * grid[1] * grid[2];
    const P = this.prepare(N, cache ? cache.tokens : N);
    this.embedPatches(x, T, P);
    this.embedCondition(label, action, timeScale, P);
    const rotary = this.model.use_rope ? this.rotary(grid, timeScale, cache ? cache.count : 0) : null;
    for (let block = 0; block < this.model.depth; block++) this.block(block, rotary, N, P, cache);
    this.linear("final_layer.adaLN_modulation.1", P.condition, D, P.modulation, 2 * D, 1);
    this.modulate(P.tokens, P.modulation, P.modulation + D, N, P.normed);
    this.linear("final_layer.linear", P.normed, D, P.wide, this.values, N);
    const f = new Float32Array(x.length);
    const out = this.memory.floats;
    const stride = up(this.values, 8);
    this.patchValues(T, (at, n, frame, c, inPatch) => {
      if (frame < T) f[at] = out[P.wide + n * stride + inPatch * C + c];
    });
    return f;
  }

  // Call visit(index in the clip, token, frame, channel, index in a channel of the patch) for each value; frames of an
  // incomplete patch have the index of the last frame.
  patchValues(T, visit) {
    const {temporal_patch_size: pt, patch_size: p, in_channels: C, input_size: S} = this.model;
    const side = S / p;
    for (let c = 0; c < C; c++)
      for (let frame = 0; frame < up(T, pt); frame++)
        for (let y = 0; y < S; y++)
          for (let x = 0; x < S; x++) {
            const at = ((c * T + Math.min(frame, T - 1)) * S + y) * S + x;
            const n = (Math.floor(frame / pt) * side + Math.floor(y / p)) * side + Math.floor(x / p);
            const inPatch = (frame % pt * p + y % p) * p + x % p;
            visit(at, n, frame, c, inPatch);
          }
  }

  embedPatches(x, T, P) {
    const D = this.model.hidden_size;
    const width = up(D, 8);
    const stride = up(this.values, 8);
    const data = this.memory.floats;
    const size = this.values / this.model.in_channels;
    this.patchValues(T, (at, n, _, c, inPatch) => { data[P.wide + n * stride + c * size + inPatch] = x[at]; });
    this.linear("x_embedder.proj", P.wide, this.values, P.tokens, D, this.N);
    if (!this.table) return;
    const rows = this.table.length / D;
    for (let n = 0; n < this.N; n++)
      for (let i = 0; i < D; i++) data[P.tokens + n * width + i] += this.table[n % rows * D + i];
  }

  embedCondition(label, action, timeScale, P) {
    const {hidden_size: D, num_classes: classes, actions} = this.model;
    const data = this.memory.floats;
    const half = FEATURES / 2;
    const number = f32(Math.log2(f32(REFERENCE_FPS * f32(timeScale))));
    for (let j = 0; j < half; j++) {
      const angle = f32(number * f32(10000 ** -f32(j / half)));
      data[P.features + j] = Math.cos(angle);
      data[P.features + half + j] = Math.sin(angle);
    }
    this.linear("t_embedder.mlp.0", P.features, FEATURES, P.hidden, D, 1);
    for (let i = 0; i < D; i++) data[P.hidden + i] = silu(data[P.hidden + i]);
    this.linear("t_embedder.mlp.2", P.hidden, D, P.condition, D, 1);
    const rows = [this.weights["y_embedder.embedding_table.weight"] + (label ?? classes) * D];
    if (actions) rows.push(this.weights["y_embedder.action_table.weight"] + (action ?? actions.split(",").length) * D);
    for (let i = 0; i < D; i++) {
      const sum = rows.reduce((value, row) => value + data[row + i], data[P.condition + i]);
      data[P.condition + i] = silu(sum);
    }
  }

  rotary(grid, timeScale, begin) {
    const key = `${grid} ${timeScale} ${begin}`;
    if (this.rotaryKey !== key) this.rotaryParts = rotaryAngles(this.model, grid, timeScale, begin);
    this.rotaryKey = key;
    return this.rotaryParts;
  }

  block(index, rotary, N, P, cache) {
    const name = `blocks.${index}`;
    const D = this.model.hidden_size;
    const shift = P.modulation;
    this.linear(`${name}.adaLN_modulation.1`, P.condition, D, P.modulation, 6 * D, 1);
    this.modulate(P.tokens, shift, shift + D, N, P.normed);
    this.attention(index, rotary, N, P, cache);
    this.addGated(shift + 2 * D, N, P);
    this.modulate(P.tokens, shift + 3 * D, shift + 4 * D, N, P.normed);
    this.linear(`${name}.mlp.fc1`, P.normed, D, P.wide, 4 * D, N);
    this.kernel.gelu(P.wide, N * up(4 * D, 8));
    this.linear(`${name}.mlp.fc2`, P.wide, 4 * D, P.branch, D, N);
    this.addGated(shift + 5 * D, N, P);
  }

  modulate(from, shift, scale, N, to) {
    const D = this.model.hidden_size;
    const width = up(D, 8);
    const data = this.memory.floats;
    for (let n = 0; n < N; n++) {
      const row = from + n * width;
      const out = to + n * width;
      let mean = 0;
      let square = 0;
      for (let i = 0; i < D; i++) mean += data[row + i];
      mean /= D;
      for (let i = 0; i < D; i++) square += (data[row + i] - mean) ** 2;
      const inverse = 1 / Math.sqrt(square / D + EPS);
      for (let i = 0; i < D; i++)
        data[out + i] = data[shift + i] + (data[row + i] - mean) * inverse * (1 + data[scale + i]);
    }
  }

  addGated(gate, N, P) {
    const D = this.model.hidden_size;
    const width = up(D, 8);
    const data = this.memory.floats;
    for (let n = 0; n < N; n++)
      for (let i = 0; i < D; i++) {
        const at = n * width + i;
        data[P.tokens + at] += data[gate + i] * data[P.branch + at];
      }
  }

  attention(index, rotary, N, P, cache) {
    const name = `blocks.${index}.attn`;
    const {hidden_size: D, num_heads: heads} = this.model;
    this.linear(`${name}.qkv`, P.normed, D, P.wide, 3 * D, N);
    for (let head = 0; head < heads; head++) {
      const seen = cache ? cache.heads[index * heads + head] : P.clip;
      this.attentionHead(name, head, rotary, N, P, seen, cache ? cache.first : 0, cache ? cache.end : N);
    }
    this.linear(`${name}.proj`, P.normed, D, P.branch, D, N);
  }

  // From queries, keys and values in `wide` to the head's columns of `normed`. Keys and values become tokens `first` to
  // first + N of the seen ones; tokens before `end` count.
  attentionHead(name, head, rotary, N, P, seen, first, end) {
    const D = this.model.hidden_size;
    const d = D / this.model.num_heads;
    const {matmul, softmax} = this.kernel;
    const data = this.memory.floats;
    const stride = up(3 * D, 8);
    const width = up(D, 8);
    const headWidth = up(d, 8);
    const columns = up(seen.tokens, 8);
    const rows = up(N, 4);
    const q = P.wide + head * d;
    const k = q + D;
    const v = k + D;
    for (let n = 0; n < N; n++) {
      this.turn(q + n * stride, d, `${name}.q_norm.weight`, rotary, n);
      this.turn(k + n * stride, d, `${name}.k_norm.weight`, rotary, n);
      for (let i = 0; i < d; i++) data[P.q + n * d + i] = data[q + n * stride + i] / Math.sqrt(d);
    }
    pack(data, k, stride, 1, N, d, data, seen.keys, {row: first});
    pack(data, v, 1, stride, d, N, data, seen.values, {column: first, depth: seen.tokens});
    matmul(P.q, d, seen.keys, P.scores, columns, rows, d, up(end, 8), P.none);
    for (let n = 0; n < N; n++) data.fill(-1e30, P.scores + n * columns + end, P.scores + (n + 1) * columns);
    softmax(P.scores, N, columns);
    matmul(P.scores, columns, seen.values, P.head, headWidth, rows, seen.tokens, headWidth, P.none);
    for (let n = 0; n < N; n++)
      for (let i = 0; i < d; i++) data[P.normed + n * width + head * d + i] = data[P.head + n * headWidth + i];
  }

  // Normalize the query or key of token n if the model does, then rotate it.
  turn(place, d, norm, rotary, n) {
    const data = this.memory.floats;
    const weight = this.weights[norm];
    if (weight !== undefined) {
      let square = 0;
      for (let i = 0; i < d; i++) square += data[place + i] ** 2;
      const inverse = 1 / Math.sqrt(square / d + EPS);
      for (let i = 0; i < d; i++) data[place + i] *= inverse * data[weight + i];
    }
    if (!rotary) return;
    for (let j = 0; j < d / 2; j++) {
      const cos = rotary.cos[n * d / 2 + j];
      const sin = rotary.sin[n * d / 2 + j];
      const a = data[place + 2 * j];
      const b = data[place + 2 * j + 1];
      data[place + 2 * j] = a * cos - b * sin;
      data[place + 2 * j + 1] = a * sin + b * cos;
    }
  }
}

// Rotated keys and values of the newest clean patches of a causal model, of all blocks (EqM/causal.py), in a ring with a
// place for each patch of the context and one for the patch that comes next. Rotations count from the first patch, not
// from the oldest one that is kept: attention sees only differences. So what is kept never moves.
class Cache {
  constructor(network) {
    const {depth, num_heads: heads, context, temporal_patch_size: pt} = network.model;
    const [, height, width] = network.grid(pt);
    this.patch = height * width;  // tokens
    this.places = Math.floor(context / pt) + 1;
    this.tokens = this.places * this.patch;
    this.memory = network.memory;
    this.begin = this.memory.top;
    this.heads = Array.from({length: depth * heads}, () => network.keysAndValues(this.tokens));
    this.count = 0;  // patches that were made; the next one replaces the oldest
    network.end = this.memory.top;  // which `prepare` leaves alone
    this.last = network.end;
    network.N = undefined;
  }

  clear() {
    this.count = 0;
    this.memory.floats.fill(0, this.begin, this.last);  // 0 x NaN is NaN
  }

  get first() {  // token of the next patch
    return this.count % this.places * this.patch;
  }

  get end() {  // after the last token that counts
    return Math.min(this.count + 1, this.places) * this.patch;
  }
}

// Write the matrix whose element (n, k) is values[place + n * rowStride + k * stride] into panels at out[to ...], which
// hold a matrix of `depth` columns. There, it begins at (row, column).
function pack(values, place, rowStride, stride, N, K, out, to, {row = 0, column = 0, depth = K} = {}) {
  for (let n = 0; n < N; n++) {
    const panel = to + ((row + n >> 3) * depth + column) * 8 + (row + n & 7);
    for (let k = 0; k < K; k++) out[panel + 8 * k] = values[place + n * rowStride + k * stride];
  }
}

function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = bits >> 10 & 31;
  const mantissa = bits & 1023;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  if (exponent === 0) return sign * mantissa * 2 ** -24;
  return sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
}

// The descent (EqM/samplers.py) ------------------------------------------------------------------------

// f_null + guidance (f_label - f_null), as `guided`. caches: of a causal model, with the condition and without it
function guidedField(network, x, {guidance = 1, caches: [cache, cacheOfNone] = [], ...settings}) {
  if (!Number.isFinite(guidance)) throw new Error(`guidance ${guidance}; expected a number`);
  const f = network.field(x, {...settings, cache});
  if (guidance === 1 || (settings.label == null && !cache)) return f;
  const none = network.field(x, {...settings, label: null, action: null, cache: cacheOfNone});
  for (let i = 0; i < f.length; i++) f[i] = none[i] + guidance * f32(f[i] - none[i]);
  return f;
}

// One step of `descend` from x, where `last` is the field before. Pinned frames (numbers) stay. Returns the next x, the
// field and its root mean square over the other frames; x is null if that is below stopBelow.
function descend(network, {x, last, pinned, stepSize, momentum, stopBelow, ...settings}) {
  const {numFrames} = settings;
  const area = x.length / numFrames / network.model.in_channels;
  const isPinned = new Set(pinned);
  const moves = i => !isPinned.has(Math.floor(i / area) % numFrames);
  const ahead = x.map((value, i) => moves(i) ? value + f32(stepSize * momentum) * last[i] : value);
  const f = guidedField(network, ahead, settings).map((value, i) => moves(i) ? value : 0);
  const squares = f.reduce((sum, value) => sum + value * value, 0);
  const rms = Math.sqrt(squares / f.length * numFrames / (numFrames - isPinned.size));
  if (rms < stopBelow) return {f, rms, x: null};
  return {f, rms, x: x.map((value, i) => value + f32(stepSize) * f[i])};
}

// The worker -------------------------------------------------------------------------------------------

function fromBase64(text) {
  return Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
}

let network;

function load({model, shapes, weights, kernel, plain}) {
  let chosen = plainKernel();
  if (!plain && typeof WebAssembly !== "undefined") {
    try {
      chosen = compiledKernel(fromBase64(kernel));
    } catch (error) {
      if (!(error instanceof WebAssembly.CompileError)) throw error;  // no SIMD here: the fallback does
    }
  }
  network = new Network(model, shapes, fromBase64(weights), chosen);
  return chosen.name;
}

const TASKS = {
  load,
  field: ({x, ...settings}) => guidedField(network, x, settings),
  descend: state => descend(network, state),
};

self.onmessage = ({data: {id, task, ...input}}) => {
  try {
    postMessage({id, result: TASKS[task](input)});
  } catch (error) {
    postMessage({id, error: error.message});
  }
};
