// Frames of a causal model, one temporal patch after the other: Stream of EqM/generation.py, by Euler's method. It
// follows descent.js, in a worker of world.html.
"use strict";

// of c(gamma), see EqM/transport.py
const FIELD_SCALE = 4;
const DECAY_START = 0.8;

let caches = [];  // with the condition and, for guidance, without one

function restart({guidance}) {
  const count = guidance === 1 ? 1 : 2;
  while (caches.length < count) caches.push(new Cache(network));
  for (const cache of caches) cache.clear();
}

// Continue with a clean patch x (C, pt, H, W), whose settings are those of `field`.
function show({x, guidance, ...settings}) {
  guidedField(network, x, {...settings, guidance, caches});
  for (const cache of caches) cache.count += 1;
}

// Make the next patch from noise x, by so many evaluations (`integrate` of EqM/samplers.py), and continue with it.
function make({x, evaluations, shift, ...settings}) {
  const gammaAt = u => u / (u + shift * (1 - u));
  for (let index = 0; index < evaluations; index++) {
    const gamma = gammaAt(index / evaluations);
    const step = gammaAt((index + 1) / evaluations) - gamma;
    const factor = FIELD_SCALE * Math.min(1, (1 - gamma) / (1 - DECAY_START));
    const f = guidedField(network, x, {...settings, caches});
    x = x.map((value, i) => value + f32(f32(step) * f32(f[i] / factor)));
  }
  show({x, ...settings});
  return x;
}

Object.assign(TASKS, {restart, show, make});
