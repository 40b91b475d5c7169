"""All that a user can get wrong, in one table: one line that says what, exit status 2, and nothing
was touched.

The commands run in this process, for speed; test_sample_gd.py runs a wrong one on two ranks.
"""

import importlib
import os
import pickle
import shutil
import sys
from shlex import split

import numpy as np
import pytest
import torch

import checkpoint
import published
from test_actions import write_world
from test_gallery import make_samples as make_shown
from test_plot_metrics import make_run
from tiny_data import (
    Code,
    flip_bit,
    make_images,
    make_latents,
    make_samples,
    make_vae,
    save_checkpoint,
)
from tiny_videos import write_ucf_list, write_video
from training import refused, snapshot

VALUES = {
    "model": "--model EqM-Ti/4",
    "pixels": "--vae none --image-size 16",
    "steps": "--results-dir new --global-batch-size 4 --max-steps 20",
    "digits": "9" * 5000,
    "long": "x" * 300,
}
# A name and a command that is right; below it, what each case adds that is wrong, and what the
# line must say: the first flag, if there is one, and the words after =>. Without =>, all values.
CASES = """
train: train {model} {pixels} {steps} --video --num-frames 8 --use-rope --data-path videos
        --num-frames many | --num-frames '' | --num-frames {digits} | --num-frames 1000000000
        --model EqM-Q/4 | --ebm l3 | --ckpt | --lr 1e400 | --lr 0 | --ema-decay 1.5 | --forcing 1.5
        --val-fraction=-0.1 | --forcing-regions 2 | --val-fraction 0 | --rope-speed=-1
        --global-seed=-1 | --save-minutes -1 | --max-steps 0 | --loader-timeout nan
        --position-table time | --frame-interval 4 2 | --num-frames 3 | --rope-split 8,8
        --num-heads 7 | --depth 10000000 | --val-frames 4 2 | --mix 0.2 | --num-classes 1
        --global-batch-size 6 --grad-accum 4 | --data-path ''
        --data-path no/such | --data-path pipe
        --data-path one => 1 usable file; expected at least 2
        --data-path broken => can't open any of its videos (2 files), the first is; a.avi: ; ffmpeg
        --vae no/such/vae | --vae empty
        --max-bad-fraction 0.2 --data-path bad \
            => 0.2: 2 of 6 files are corrupt; A/x.avi, B/y.mp4; or raise this limit
        --results-dir file | --results-dir nowhere | --results-dir /proc/x
        --results-dir file --resume
        --results-dir no/such/../../file => is not a writable folder
        --ckpt no/such.pt | --ckpt no/such.pt --resume | --ckpt pipe | --ckpt /dev/zero
        --ckpt loop | --ckpt empty
        --data-path -videos => --data-path
        --global-seed 1000000000000000000000000000000 | --num-workers 1000000 => at most
        --num-frames 1000000000000 => at most
        --num-frames 8 --image-size 1000000000 => input_size; 1000000000
        --image-size 100000 => 1250000000 tokens per clip
        --image-size 18 => --image-size 18: not a multiple of 4 (VAE and patch); use 16
        --num-frames 400 => the longest training video has 10 frames
        --val-frames 4 400 => 400: the longest validation video has 10 frames: A/b.avi; replace it
        --rope-split 64,64,2 => 130 channels
        --num-frame 3 => --num-frame: no such flag; did you mean --num-frames?
        --colour=red => --colour: no such flag; see --help
        --ckpt a.pt b.pt c.pt --qk-norm => b.pt: unexpected argument; pattern
        --lr-decay-end 9 --lr-decay 0.5 => --lr-decay-end 9: expected at least
        --muon-lr 0.01 => --muon-lr 0.01: applies to --optimizer muon; add that, or remove it
        --precision fp16 => --precision fp16; GPU; bf16
        --compile => g++
        --compile --ebm dot | --grad-checkpoint selective --ebm dot => --ebm dot
        --grad-checkpoint half => full
        --context 8 | --context-noise 0.1 | --own-context 0.5 => : needs --causal
        --forcing-regions 0.5 --objective flow => 0.5: needs --objective eqm
        --forcing-regions 0.5 --objective blind => 0.5: needs --objective eqm
        --objective flow --ebm l2 => ebm l2 needs objective eqm, got flow
        --objective blind --sampler ngd => --sampler ngd: a model of --objective blind has no equi
        --stop-below --objective flow --sampler euler => 1.0: euler has a fixed number of steps
        --objective eqm --ckpt flow.pt => has objective flow, --objective gives eqm: they must agree
        --real-data x => --real-data x: needs --pairs
        --pure-noise 0.5 => --pure-noise 0.5: needs --pairs
        --rope-split 8,8,8,2 | --rope-split 16,8,7 | --rope-split 0,16,16 | --rope-split=-2,8,8
        --rope-split x => rope_split; 'x'
        --rope-speed 1001 => rope_speed must be in [0, 1000]
        --hidden-size 8 --num-heads 2 => even head_dim of at least 6, got 4
        --rope-split 20,0,0 => rope_split 20,0,0 omits height or width; needs position_table space
        --rope-split 20,4,8 --rope-speed 0.5 => rope_speed 0.5 needs 6 channels
        --hidden-size 66 --num-heads 2 => must be a multiple of 2 x 2 heads; 66
        --depth 0 => depth
        --disp --grad-accum 4 => --global-batch-size
        --stop-below 0.5 --sampler euler => --stop-below 0.5; euler
        --wandb => pip install wandb
        --data-path file => a file; expected a folder with <class>/<video>
        --data-path empty \
            => no videos found; one of .avi .m4v .mkv .mov .mp4 .webm; images need no --video
        --data-path twins => twins: A/x.avi and A/x.m4v differ only in their suffix
        --data-path mixed => some videos are in class folders (A/x.avi), others are not (y.avi)
        --data-path sampled => holds only samples of sample_gd.py, in sampled/shown; name a folder
        --data-path nameless \
            => the class none; --classes none asks for samples without a class; rename
        --data-path deep \
            => deep/train/<class> has 2 videos; merge it with test/ in one folder; pass deep/train
        --data-path images => --video
        --results-dir '' | --ckpt '' => empty
        --results-dir x\udcff => UTF-8
        --results-dir {long} => 255 bytes
        --depth 1000000 => weights
        --ckpt file | --ckpt other.pt => not a checkpoint
        --ckpt cut.pt | --ckpt flipped.pt => damaged
        --ckpt pickle.pt | --ckpt code.pt => holds code
        --ckpt export/model.safetensors => weights without their config; folder, export
        --ckpt fixed.pt => cannot be converted: retrain with --use-rope
        --ckpt image.pt => holds an image model, --video needs; or train from it with --inflate
        --ckpt odd.pt => depth 2
        --model EqM-S/4 --ckpt rope.pt => EqM-S/4
        --vae vae --ckpt rope.pt | --vae ema --ckpt rope.pt => made with none; remove --vae
        --image-size 32 --ckpt rope.pt \
            => --image-size gives 32: they must agree; change or remove --image-size
        --temporal-patch-size 2 --ckpt rope.pt | --ebm dot --ckpt rope.pt => must agree
        --position-table none --ckpt table.pt | --rope-speed 1 --ckpt rope.pt => must
        --num-classes 7 --ckpt rope.pt => must
        --optimizer muon --ckpt rope.pt => --optimizer adamw
        --max-steps 10 --ckpt rope.pt => --max-steps 10
        --data-path long --ckpt rope.pt => classes A, --ckpt rope.pt has A, B; --new-classes
        --new-classes => needs a model; add --ckpt or --inflate
        --inflate no/such.pt | --inflate cut.pt | --inflate empty | --inflate code.pt
        --inflate '' => empty
        --inflate image.pt --ckpt rope.pt => remove --ckpt
        --inflate rope.pt => --inflate rope.pt: holds a video model, expected an image model
        --inflate energy.pt => --inflate energy.pt: trained with --ebm dot; does not support
        --inflate image.pt --num-frames 3 \
            => a temporal patch needs at least 4; change --temporal-patch-size
        --inflate image.pt --image-size 32 \
            => --image-size gives 32: they must agree; change or remove --image-size
        --vae vae --inflate image.pt => made with none; remove --vae
        --model EqM-Ti/2 --inflate image.pt => --inflate image.pt has EqM-Ti/4; remove the flag
        --hidden-size 96 --inflate image.pt => --inflate image.pt: holds EqM-Ti/4
        --inflate image.pt --rope-split 16,8,8 | --inflate image.pt --rope-speed 1 => must agree
        --inflate plain.pt --rope-split 8,8,8 => has rope split 20,0,0
        --data-path long --inflate image.pt => --inflate image.pt has A, B; --new-classes
train recipe: train {model} {pixels} {steps} --data-path images
        @no/such.txt | @quote.txt | @flipped.pt => recipe
        @unknown.txt => --lrr
        @lacking.txt => argument --lr
train fixed: train {model} {pixels} {steps} --video --num-frames 8 --data-path videos
        --rope-split 8,8,8 | --rope-speed 0.5 | --rope-theta 100 => needs use_rope
        --position-table space => needs use_rope
        --val-frames 4 | --num-frames 4 --ckpt fixed.pt => tied
        --ckpt rope.pt => trained with --use-rope
        --inflate image.pt => add --video and --use-rope
        --causal => --causal: needs videos with rotary positions
train images: train {model} {pixels} {steps} --data-path images
        --inflate image.pt => add --video and --use-rope
        --num-frames 8 | --temporal-patch-size 4 | --frames-schedule 4:10 => needs videos
        --data-path cache => add --video
        --data-path videos \
            => no images found; <class>/<image> with one of .jpeg .jpg .png .webp; add --video
        --data-path deep \
            => no images in deep/<class>; deep/train/x/<class> has 1 image; pass deep/train/x
        --forcing 0.5 => --forcing 0.5: does not apply to clips of one frame
        --forcing-regions 0.5 => --forcing-regions 0.5: does not apply to clips of one frame
        --ckpt rope.pt --use-rope => holds a video model: add --video
train causal: train {model} {pixels} {steps} --video --use-rope --causal --data-path videos
        --forcing 0.5 => --forcing 0.5: a causal model always learns
        --forcing-regions 0.5 => --forcing-regions 0.5: a causal model always
        --ebm dot => causal needs use_rope, and no ebm
        --causal --ckpt energy-clips.pt => causal needs use_rope, and no ebm
        --context 3 => context must be at least a temporal patch of 4 frames
        --ckpt fixed.pt => fixed positions cannot be converted
train actions: train {model} {steps} --video --use-rope --vae none --image-size 8 --num-frames 4 \
        --temporal-patch-size 1 --data-path acted
        --frame-interval 1 2 => --frame-interval 1 2:
        --temporal-patch-size 2 => add --temporal-patch-size 1
        --data-path one-way => no mirror rule
        --data-path no-file => --data-path no-file: no ; 2.actions.npy
        --data-path brief => --data-path brief: ; got int64 [5], expected [6
        --data-path unknown => unknown action 3
        --data-path decimal => got float64
        --data-path torn => --data-path torn: torn/2.actions.npy
        --data-path no-names => but no actions.json
        --data-path none => --data-path none: ; 'none'
        --data-path comma => 'a,b'
        --data-path twice => differ
        --data-path half-mirrored => the same backward
schedule: train {model} {pixels} --video --use-rope --global-batch-size 4 --data-path videos
        --disp --frames-schedule 4:2:2,8:3:1 => --disp: compares clips; --frames-schedule
        --frames-schedule 4:10,8:5 => 8:5; increase
        --frames-schedule four => 'four'
        --frames-schedule 4 | --frames-schedule 4:x | --frames-schedule 4:10:2:1 \
            | --frames-schedule 4:10, | --frames-schedule '4:10;8:20' | --frames-schedule 0:10 \
            | --frames-schedule 4:0 | --frames-schedule 4:10:0 | --frames-schedule 4:10,8:10 \
            | --frames-schedule 4.5:10 | --frames-schedule 4:10:\u0664 | --frames-schedule '' \
            | --frames-schedule 4:999999999999 => argument
        --frames-schedule 2:10,8:20 => --frames-schedule 2; 4
        --frames-schedule 4:10,400:20:4 => --frames-schedule 400; 10
        --frames-schedule 4:10,12:20 --global-batch-size 4 => 12 frames; --global-batch-size
        --num-frames 4 --frames-schedule 4:10 => contradicts --frames-schedule
        --lr-decay-end 9 --lr-decay 1 --num-frames 8 --max-steps 10 \
            => --lr-decay-end 9; --max-steps
schedule fixed: train {model} {pixels} --video --data-path videos
        --frames-schedule 4:10,8:20 => tied to num_frames 4
train latents: train {model} {steps} --video --num-frames 8 --use-rope --no-flip --data-path cache
        --image-size 32 | --vae mse | --vae none
        --data-path partial => not complete
        --data-path later-cache => its latents.json is damaged (format 2, this code reads 1
        --data-path no-paths | --data-path not-json => its latents.json is damaged
        --data-path no-format => its latents.json is damaged ('format'
        --vae vae --data-path pixels => was made with none
        --vae vae --data-path scaled => its VAE differs from; pass its own VAE with --vae
        --vae vae --data-path others-vae => another VAE: its weights have SHA-256
        --data-path lost --vae vae => run cache_latents.py again
        --inflate image.pt => --data-path cache: made with the VAE; --inflate image.pt with none
sample: sample_gd --video --ckpt rope.pt --folder new
        --rope-scale yarn | --rope-scale ntk | --fps nan | --vae no/such/vae | --given no/such.mp4
        --init no/such.mp4 | --num-frames 3 | --num-classes 101 | --image-size 32 | --classes 2
        --classes A Kayaking | --given '' | --given x --folder x | --init-gamma 0.5 | --ckpt pipe
        --ckpt cut-export | --ckpt code.pt | --ckpt wide-export | --ckpt stepless-export
        --weak-ckpt no/such.pt | --overlap 0
        --weak-ckpt flow.pt => --weak-ckpt flow.pt: has another objective
        --weak-ckpt rope.pt --cfg-scale 1 => --weak-ckpt rope.pt: does nothing with --cfg-scale 1
        --weak-ckpt actions.pt => --weak-ckpt actions.pt: has another objective
        --weak-ckpt rope.pt --ckpt energy-clips.pt --report-energy => rope.pt: has another
        --sampler gd --ckpt flow.pt => a model of --objective flow has no equilibria to descend to
        --stop-below 1 --ckpt flow.pt => --stop-below 1.0: euler has a fixed number of steps
        --objective eqm --ckpt flow.pt => --objective gives eqm: they must agree
        --ckpt later-export => format version 2
        --folder=a b --video => b: unexpected argument
        --num-samples 2000000000 | --num-frames 1000000000 | --fps 1e300 => at most
        --model EqM-S/4 => EqM-S/4; EqM-Ti/4
        --model EqM-XL/2 --ckpt shared => EqM-XL/2
        --no-ema --ckpt shared => --no-ema
        --fps 25 --time-scale 0.04 => --time-scale
        --folder file/x => --folder file
        --folder file | --folder no/such/../../file => is not a writable folder
        --folder mine => 000000.mp4 was not made by sample_gd.py; name a new folder
        --num-sampling-steps 1 => at least 2
        --stepsize 1e-12 => larger steps
        --ckpt image.pt | --weak-ckpt image.pt => holds an image model
        --weak-ckpt fixed.pt --num-frames 16 => tied to num_frames 8
        --report-energy => without an energy
        --use-rope --ckpt fixed.pt => cannot be converted
        --rope-scale linear --ckpt fixed.pt => --rope-scale linear; fixed positions
        --vae ema --ckpt fixed.pt => the checkpoint was made with none; remove --vae
        --num-frames 16 --ckpt fixed.pt => tied to num_frames 8; use 8, or train with --use-rope
        --given-frames 0-3 | --given-split val | --samples-per-clip 2 => applies to clips of --given
        --no-keep-background => applies to clips of --given
        --window 3 --num-frames 20 => --window 3: a temporal patch
        --overlap 8 --window 8 --num-frames 20 => --overlap 8: leaves no new frame
        --overlap 8 --num-frames 20 \
            => --overlap 8: applies to several windows, but the 20 frames are made in one
        --overlap 4 --window 8 --num-frames 4 8 \
            => --overlap 4: applies to several windows; add --window, or remove it
        --init videos --window 8 --num-frames 20 => windows of 8; remove it
        --given-frames 20 --given videos --num-frames 20 \
            => 20: samples have the frames 0 to 19; expected
        --given-frames 0-19 --given videos --num-frames 20 => 0-19: samples have the frames 0 to 19
        --given videos --given-frames 0-12 --num-frames 20 => a.avi has 10 frames of 0.04 s
        --given videos --init videos => but --init changes all
        --given no/such.png => no such file or folder
        --given file | --given empty => no video or image
        --given gray => damaged
        --given bare/samples.npz => no samples.json in it
        --given bad/B/y.mp4 | --given text.png => can't be decoded
        --given shown/000000.mp4 --folder shown => in --folder shown
        --init shown/000000.mp4 --folder shown => in --folder shown
        --folder videos/A => a.avi was not made by sample_gd.py; name a new folder
        --folder videos/A --given videos/A => a.avi was not made by sample_gd.py
        --folder videos => A/a.avi was not made by sample_gd.py
        --folder several --num-frames 8 16 => --folder several-f16: notes.txt was not made by
        --given-frames 3-1 => such as 0-3,12-15
        --init-gamma 1.5 --init x.mp4 => at most 1
        --init-gamma 1 --init videos --sampler heun => --init-gamma 1; heun
        --solver-shift 3 => --solver-shift 3.0: applies to euler and heun, not to gd
        --stop-below 0.5 --sampler heun => --stop-below 0.5: heun has a fixed number of steps
        --given cache --given-split val | --given empty --given-split val => error: --given
        --given videos --given-split val --num-frames 100 \
            => --given videos: the longest video of --given-split val
        --actions left*2 => --actions left*2: ; was trained without actions; remove it
        --given no/such --given-split val => --given no/such: no such folder
sample flow: sample_gd --video --ckpt flow.pt --folder new
        --overlap 3 --window 8 --num-frames 16 => --overlap 3: splits a temporal patch
        --window 10 --num-frames 16 => --window 10: splits a temporal patch
        --window 4 --num-frames 16 => --window 4: expected two temporal patches
        --given images/A/0.png => has 1 frame; expected at least 4, a temporal patch
        --given videos --given-frames 0-2 --num-frames 8 => 0-2: splits a temporal patch of 4 frames
        --given videos --given-frames 8-9 --num-frames 10 --window 8 => 8-9: splits a temporal patch
sample causal: sample_gd --video --ckpt causal.pt --folder new
        --window 8 => --window 8: does not apply to a causal model
        --overlap 4 => --overlap 4: does not apply to a causal model
        --init videos/A/a.avi => a.avi: does not apply to a causal model
        --report-energy => --report-energy: does not apply to a causal model
        --rope-scale linear => --rope-scale linear: does not apply to a causal model
        --classes 0*6 => --classes 0*6: expected spans such as
        --classes 0*8 1*4 => --classes: spans of 4 and 8 frames
        --classes 0*8 --num-frames 16 => spans of 8 frames for --num-frames 16
sample actions: sample_gd --video --ckpt actions.pt --folder new
        --actions up*2 => --actions up*2: no action 'up'; expected one of stay, left, right
        --actions left* => --actions left*: got 'left*'; expected spans such as stay*8
        --actions '' => expected spans such as stay*8
        --actions gone.npy => --actions gone.npy: No such file
        --actions left*3 --num-frames 5 \
            => --actions: 3 actions after 1 frame make 4 frames, other flags ask for 5
        --given videos --given-frames 1 --actions left => expected --given-frames from 0 on
sample images: sample_gd --ckpt image.pt --folder new
        --given videos | --num-frames 4 | --fps 1 => needs videos; add --video
        --init videos/A/a.avi => no image
        --ckpt rope.pt => holds a video model: add --video
cache: cache_latents --data-path videos --vae vae --image-size 16 --out new
        --use-rope => --use-rope: no such flag
        --vae code-vae => diffusion_pytorch_model.safetensors
        --vae emma | --vae '' => none, ema, mse or a directory
        --data-path no/such | --out videos | --out cache | --image-size 33
        --data-path cache => name the folder of its videos
        --data-path long => A/aaaa; is too long for a file of the cache; shorten it by 6 bytes
        --out file | --out no/such/../../file => not a writable folder
        --out piped => --out piped; latents.json is damaged
evaluate: evaluate --metric=motion --samples=samples --data-path videos --out new.json
        --samples empty | --data-path no/such | --metric beauty
        --samples code-samples => not a plain array of clips of one size
        --samples bare => no samples.json in it; expected a sample folder
        --samples cut-samples => zip
        --samples image-samples => holds images
        --samples floats | --samples gray => expected uint8
        --samples no-clips | --samples no-frames | --samples no-rows => damaged
        --samples label-99 => up to label 99
        --detector x => for --metric motion; remove
        --num-real 1 => at least 2
        --metric prediction --num-real 3 => --num-real; prediction chooses its real clips
        --samples samples --metric prediction => has clips of 8 px, SSIM needs at least 11
        --samples samples --metric world => does not continue the clips; again with --given
        --metric nearest --split val => --split; chooses its real clips
        --metric census --split val => --split; chooses its real clips
        --samples other-class --metric classifier \
            => has class C, --data-path videos has A, B; pass the data
        --samples unlabeled --metric classifier => has samples without a class
        --samples changing => has samples whose class changes, --metric motion needs one class
        --data-path long --metric classifier \
            => 1 class, 2 groups in A; expected at least 2 of both
        --data-path listed --metric classifier => no training video of class B; lower --val-fraction
        --data-path listed --metric classifier --classifier-test val \
            => no validation video of class A
        --metric nearest --vae v => needs no VAE
        --out file/a.json | --out no/such/../../file/a.json => is not a writable folder
        --cache file/a => is not a writable folder
        --out empty | --out a.png => the name of a JSON file, such as motion.json
        --data-path empty => no videos found
        --data-path cache => a latent cache; name the folder of its videos
        --metric fvd => --detector; --metric fvd
        --detector no/such --metric fvd | --detector empty --metric fvd => i3d_torchscript.pt
        --detector code.pt --metric fvd | --detector pickle.pt --metric fvd => i3d_torchscript.pt
        --samples one-clip --metric consistency => has 1 clip,
        --samples samples --metric consistency => does not say the temporal_patch_size
        --data-path videos --samples slow => --split val has 10 frames; expected at least 25
        => --data-path videos; is for Moving Shapes
export: export
        no/such.pt new => no such file
        rope.pt => DIR
        rope.pt '' => DIR; empty
        rope.pt odd.pt new => new: unexpected argument, CKPT is rope.pt, DIR is odd.pt
        rope.pt videos => DIR videos; not empty
        code.pt new => holds code
        rope.pt new --model EqM-XL/2 => --model EqM-XL/2
        rope.pt new --ebm dot => --ebm gives dot
        rope.pt new --dtype int8 => --dtype
        rope.pt new --scores cache/latents.json => has format 1
        rope.pt new --scores no/such.json | rope.pt new --scores list.json => can't be read
        rope.pt --html '' | rope.pt --html videos => expected the name of an HTML file
        rope.pt new --html new | rope.pt new/x --html new => --html new: becomes the folder of DIR
        rope.pt --html file/x.html => --html file: ; not a writable folder
        energy-clips.pt --html new.html => has an energy (ebm dot)
        flow.pt --html new.html => learned objective flow
        rope.pt --html new.html --given images/A/0.png \
            => --given images/A/0.png: applies to the page of a causal model
        rope.pt --html new.html --dtype fp16 => --dtype: has no effect
shapes: make_moving_shapes --out new
        --size big | --out file | --seconds inf | --seconds 0 | --videos-per-class 1000000000000
        --size 8 | --size 63 | --radius nan nan | --radius 0.2 0.1 | --radius 0.1 0.3
        --colors mauve | --videos-per-class 1
        --out videos => --out videos; not Moving Shapes
train_vae: train_vae --data-path videos --image-size 16 --downsample 4 --widths 8 8 8 {steps}
        --downsample 2 | --data-path no/such
        --image-size 18 => --image-size 18: not a multiple of --downsample 4
        --results-dir file | --results-dir no/such/../../file => is not a writable folder
        --muon-lr 0.1 --optimizer adamw => --muon-lr 0.1: applies to --optimizer muon
        --widths 8 8 => --widths 8 8: expected 3 numbers for --downsample 4
check: check --num-frames 8 --model EqM-Ti/4 --global-batch-size 2 {pixels}
        no/such => DIR no/such: no such folder
        videos --image-size 18 => --image-size 18: not a multiple of 4
        videos --num-frames 3 => at least 4
        videos --val-fraction 0 => got 0, expected a number above 0 and at most 1
        videos --out x.txt => --out x.txt: not a picture; expected a name that ends in .png
        videos --out file/x.png => --out file:
augment: augment --data-path videos --out new
        --data-path no/such => no such folder
        --out videos => the same as --data-path
        --out larger --copies 1 => a-copy2.mkv, which does not belong to this data set
study: study --out new
        --minutes 0
        --only A E \
            => argument --only: invalid choice: 'E' (choose from 'A', 'B', '16 fixed',
        --list --report => not allowed with
        --report => new/study.json has no rows
        --out file --report => --out file:
        --miniature --out results/studies/x => --miniature: its rows would join those in results
positions: positions sprites --out new
        => --data-path: expected the videos of sprites
control: control --out new
        --arms flow => --arms flow: its tuning is not complete; run with --tune first
control on sprites: control_sprites --data-path videos --out new --arms eqm
        => eqm, training shift 1: not tuned yet; run with --tune first
few: few --out new
        --arms 'cheap pairs' => the tuning of pairs is not complete; run with --tune first
        --seeds 3 --tune => --seeds: tuning has its own seeds; remove the flag, or --tune
        --arms 'cheap pairs' --tune => --arms cheap pairs: has no tuning of its own
people: people --out new
        nothing => nothing/settings: no such file; expected finished runs of scripts/weizmann.sh
sprites: sprites --out new
        nothing => nothing/settings: no such file; expected finished runs of scripts/sprites.sh
gallery: gallery
        no/such => FOLDER no/such: no such folder
        videos => no samples.json in it
        samples => its samples.json has no cfg_scale; sample again
        lacking --out new.html => no 000001.mp4
        shown --out videos => --out videos
        shown --out file/page.html => --out file
        shown --data-path no/such --out new.html => no such folder
        shown --data-path videos => no class 'Cirque\\ndu "soleil"'
        longer --data-path videos => has the 11 frames of the samples
        shown --data-path cache --out new.html => name the folder of its videos
        shown --num-samples 0 --out new.html => --num-samples
        shown longer => FOLDER longer: a page shows one folder; remove it or add --png
        shown --out new.html --rows 2 => --rows 2: does not apply to a page; remove the flag
picture: gallery --png new.png
        begun => not finished: run sample_gd.py again
        shown --out new.html => not allowed with
        shown --num-samples 2 => --num-samples 2: does not apply to a picture
        shown --png videos => --png videos: a folder
        shown --data-path videos => a picture has no real clips; remove it
plot: plot_metrics --out new/loss.png
        no/such => no/such: no metrics.jsonl
        runs/E/0-f4/metrics.jsonl | videos => no metrics.jsonl
        runs/empty => no step yet
        runs/other-f4 => no train_loss
        runs/cut-f4 => runs/cut-f4: its config.json is not that of a run
        runs/E --relative => no train_loss_rel
        runs/E --out loss.pdf => loss.pdf: not the name of a PNG file
        runs/E --out taken.png => taken.png: not the name of a PNG file
        runs/E --out file/loss.png => is not a writable folder
plot without --out: plot_metrics
        runs/E => --out
"""


def cases():
    """Yield (command, flags, words that the line must have) of each case."""
    for line in CASES.strip().splitlines():
        if not line.startswith(" "):
            name, _, command = line.partition(": ")
            continue
        left, arrow, right = line.partition("=> ")
        for flags in left.strip().split(" | "):
            typed = split(flags.replace("=", " "))
            words = right.split("; ")
            if not arrow:
                words = [word for word in typed if not word.startswith(("-", "{"))]
            if flags.startswith("-") and "argument" not in right:
                words.append(typed[0])
            yield pytest.param(command, flags, words, id=f"{name} {flags}")


FILES = """
    text.png                hello
    list.json               [1, 2]
    bad/A/x.avi             no video
    bad/B/y.mp4             no video
    broken/a.avi            RIFF and no more
    broken/b.mp4            RIFF and no more
    no-format/latents.json  {}
    not-json/latents.json   [
    quote.txt               --lr 'a
    unknown.txt             --lrr 1
    lacking.txt             --lr
    file
    begun/samples.unfinished
    mine/000000.mp4
    several-f16/notes.txt
    larger/A/a-copy2.mkv
    twins/A/x.avi
    twins/A/x.m4v
    mixed/A/x.avi
    mixed/y.avi
    nameless/none/x.avi
    nameless/A/y.avi
    deep/test/A/x.avi
    deep/train/A/x.avi
    deep/train/B/y.m4v
    deep/train/x/A/x.png
"""  # a file and all that is in it
LACKING = """
    bare        samples  samples.json
    code-vae    vae      diffusion_pytorch_model.safetensors
    lacking     shown    000001.mp4
    no-file     acted    2.actions.npy
    no-names    acted    actions.json
"""  # a folder, the folder it is a copy of, and the file that it lacks
CUT = "cut.pt torn/2.actions.npy cut-samples/samples.npz cut-export/model.safetensors"
VARIANTS = """
    other-class     samples   samples.json  ["A"] => ["C"]
    slow            samples   samples.json  0.04 => 0.48
    changing        samples   samples.json  "classes" => "spans": [[0, 1]], "classes"
    lost            cache     latents.json  "ema" => "vae"
    scaled          lost      latents.json  0.18215 => 0.5
    others-vae      lost      latents.json  "vae", => "vae", "vae_sha256": "0123",
    pixels          cache     latents.json  "ema" => "none"
    later-cache     cache     latents.json  "format": 1 => "format": 2
    no-paths        cache     latents.json  "path" => "place"
    wide-export     shared    config.json   "hidden_size": 192 => "hidden_size": 96
    stepless-export shared    config.json   "step" => "steps"
    later-export    shared    config.json   "version": 1 => "version": 2
    one-way         acted     actions.json  "mirror" => "no mirror"
    half-mirrored   acted     actions.json  "right": "left" => "stay": "stay"
    none            acted     actions.json  stay => none
    comma           acted     actions.json  stay => a,b
    twice           acted     actions.json  stay => left
"""  # a folder, the folder it is a copy of, a file, a text in the file => what replaces the text

CLIPS = {"use_rope": True, "num_frames": 4}
IMAGES = {"num_frames": 1, "temporal_patch_size": 1}
CHECKPOINTS = {  # the settings of their models
    "rope": CLIPS,
    "table": CLIPS | {"position_table": "space"},
    "odd": CLIPS | {"depth": 2},
    "energy-clips": CLIPS | {"ebm": "dot"},
    "flow": CLIPS | {"objective": "flow"},
    "causal": CLIPS | {"causal": True, "context": 8},
    "actions": CLIPS | {"temporal_patch_size": 1, "actions": "stay,left,right"},
    "fixed": {"num_frames": 8},
    "image": IMAGES | {"use_rope": True},
    "plain": IMAGES,
    "energy": IMAGES | {"ebm": "dot"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with all that the cases name, and its snapshot; every test leaves it as it is."""
    root = tmp_path_factory.mktemp("world")

    def copy(folder, name):
        return shutil.copytree(root / folder, root / name)

    for name in ("videos/A/a", "videos/A/b", "videos/B/c", "videos/B/d", "one/A/a"):
        write_video(root / f"{name}.avi", 10, size=(16, 16))
    for letter in "ab":
        write_video(root / f"long/A/{letter * 245}.avi", 10, size=(16, 16))
    for name in ("bad", "larger"):
        copy("videos", name)
    write_ucf_list(copy("videos", "listed"), ["A/a", "A/b"])  # B has no training video, A no other
    make_images(root / "images", 4)
    make_vae(root / "vae")
    for name, settings in CHECKPOINTS.items():
        save_checkpoint(root / f"{name}.pt", **settings)
    rope = root / "rope.pt"
    for name in ("cut.pt", "flipped.pt"):
        shutil.copyfile(rope, root / name)
    flip_bit(root / "flipped.pt", checkpoint.load(rope)["ema"]["blocks.0.attn.qkv.weight"])
    (root / "pickle.pt").write_bytes(pickle.dumps(Code()))
    (root / "export").mkdir()
    (root / "export/model.safetensors").write_bytes(bytes(8))
    torch.save({"model": Code()}, root / "code.pt")
    torch.save({"state_dict": {}}, root / "other.pt")
    published.write_export(root / "shared", checkpoint.load(rope), "fp32", "a card")
    write_world(root / "acted")
    for name, actions in (("brief", [0] * 5), ("unknown", [0] * 5 + [3]), ("decimal", [0.0] * 6)):
        np.save(copy("acted", name) / "2.actions.npy", np.array(actions))
    make_latents(root / "cache")
    (copy("cache", "partial") / "latents.json").rename(root / "partial/latents.partial.json")
    for name in ("empty", "samples", "piped", "taken.png"):
        (root / name).mkdir()
    make_samples(root / "samples")
    clips = np.load(root / "samples/samples.npz")["arr_0"]
    labels = {"label-99": 99, "unlabeled": -1}
    for name, changed in {
        "one-clip": clips[:1],
        "image-samples": clips[:, 0],
        "floats": clips / 255,
        "label-99": clips,
        "unlabeled": clips,
        "no-clips": clips[:0],
        "no-frames": clips[:, :0],
        "no-rows": clips[:, :, :0],
        "gray": clips[..., :1],
        "code-samples": np.array([Code(), Code()]),
    }.items():
        of_clips = np.full(len(changed), labels.get(name, 0))
        np.savez(copy("samples", name) / "samples.npz", arr_0=changed, labels=of_clips)
    make_shown(root / "shown", [0, 1], ["A", 'Cirque\ndu "soleil"'])
    make_shown(root / "longer", [0, 1], ["A", "B"], num_frames=11)
    copy("shown", "sampled/shown")
    for name, folder, file in map(str.split, LACKING.strip().splitlines()):
        (copy(folder, name) / file).unlink()
    copy("acted", "torn")
    copy("samples", "cut-samples")
    copy("shared", "cut-export")
    for file in split(CUT):
        os.truncate(root / file, 150)
    torch.save({"decoder.conv_out.bias": Code()}, root / "code-vae/diffusion_pytorch_model.bin")
    make_run(root / "runs/E/0-f4", 0, 50)
    make_run(root / "runs/empty/0-f4", 0, 0)
    make_run(root / "runs/other-f4", 0, 0, torn='{"step": 1}\n')
    (make_run(root / "runs/cut-f4", 0, 10) / "config.json").write_text('{"training": {')
    for line in FILES.strip().splitlines():
        name, *text = line.split(maxsplit=1)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(text))
    for line in VARIANTS.strip().splitlines():
        place, _, new = line.partition(" => ")
        name, folder, file, old = place.split(maxsplit=3)
        path = copy(folder, name) / file
        path.write_text(path.read_text().replace(old, new))
    (root / "lost/A/a.safetensors").unlink()
    for name in ("pipe", "piped/latents.json"):
        os.mkfifo(root / name)
    (root / "loop").symlink_to("loop")
    (root / "nowhere").symlink_to("no/such")
    return root, snapshot(root)


@pytest.mark.parametrize("command, flags, words", list(cases()))
def test_bad_input_is_one_line_and_status_2_and_nothing_is_touched(
    command, flags, words, world, monkeypatch, capsys, caplog
):
    script, *right = split(command.format(**VALUES))
    flags = split(flags.format(**VALUES))
    root, before = world
    monkeypatch.chdir(root)
    monkeypatch.setitem(sys.modules, "wandb", None)  # is not installed
    if flags == ["--compile"]:  # nor is a compiler
        monkeypatch.setenv("PATH", "empty")
        monkeypatch.delenv("CXX", raising=False)
    line = refused(capsys, importlib.import_module(script), *right, *flags)
    assert line.startswith(f"{script}.py: error: ")
    assert all(word in line for word in words), line
    assert not caplog.records  # of a library; where they go depends on which test imported it
    assert snapshot(root) == before
