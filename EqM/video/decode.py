"""Decodes a long video from a keyframe on, with PyAV, to the same pixels as decord in files.py.

Whatever makes the numbers or pixels of frames uncertain is an error. decord then decodes from the
first frame on.
"""

import heapq
from contextlib import suppress
from functools import partial
from itertools import dropwhile

import av

CODECS = "h264", "hevc", "mpeg4", "vp8", "vp9"
AVI_CODECS = ("mpeg4",)  # AVIs have no time stamps, and FFmpeg guesses wrong ones for h264
FRAME_START = b"\0\0\1\xb6"  # of a frame of mpeg4
# for degrees, counterclockwise
TRANSPOSES = {90: ["cclock"], 180: ["clock", "clock"], 270: ["clock"]}


def read_packets(file, num_frames):
    """(number of frames, keyframes) of a video in a container of PyAV, in which decord counts
    num_frames. Keyframes, if several, are a list of [frame number, time stamp, time to seek to].

    Frames are numbered in the order of their time stamps. All frames from a keyframe's number on
    decode from there; in an open GOP, frames before it follow it in the file. The list is empty
    unless each packet is a frame. decord also counts frames after the end that an edit list sets.
    """
    times = []
    keyframes = []
    removed = []  # time stamps of frames that an edit list removes
    latest = -float("inf")
    stream = _video_stream(file)
    is_avi = file.format.name == "avi"
    codec = stream.codec_context.name
    if codec not in (AVI_CODECS if is_avi else CODECS):
        return num_frames, []
    for packet in file.demux(stream):
        if not packet.size:  # the end of the file
            continue
        if packet.is_discard:
            removed.append(packet.pts)
            continue
        # XviD: two frames in one
        is_packed = codec == "mpeg4" and bytes(packet).count(FRAME_START) != 1
        if packet.pts is None or packet.is_corrupt or is_packed:
            return num_frames, []
        if packet.is_keyframe and packet.pts > latest:
            seek_time = packet.dts if is_avi else packet.pts
            keyframes.append((packet.pts, seek_time))
        times.append(packet.pts)
        latest = max(latest, packet.pts)
    numbers = {time: number for number, time in enumerate(sorted(times))}
    num_kept = num_frames - sum(time > latest for time in removed)
    if not len(numbers) == len(times) == num_kept:
        return num_frames, []
    if len(keyframes) < 2:
        return num_kept, []
    return num_kept, [[numbers[time], time, seek_time] for time, seek_time in keyframes]


def _video_stream(file):
    """The video stream that players choose. Raises ValueError if a container has none."""
    stream = file.streams.best("video")
    if stream is None:
        raise ValueError("no video stream")
    return stream


def decode_from(file, keyframe, height, width):
    """Yields the frames from a keyframe on, each as a function that returns its pixels, uint8
    (height, width, 3).
    """
    _, first, seek_time = keyframe
    # waiting: a heap of the time stamps whose frames have not come out yet
    waiting = []
    graph = None
    stream = _video_stream(file)
    context = stream.codec_context
    if context.width * context.height != height * width:
        raise ValueError("the size has changed since the scan")
    context.thread_count = 1
    file.seek(seek_time, stream=stream)

    def is_before(packet):
        return packet.pts != first or not packet.is_keyframe

    for packet in dropwhile(is_before, file.demux(stream)):
        if packet.size and not packet.is_discard and packet.pts >= first:
            heapq.heappush(waiting, packet.pts)
        for frame in packet.decode():
            if frame.pts is not None and frame.pts < first:  # of an open GOP
                continue
            if frame.is_corrupt or frame.pts != heapq.heappop(waiting):
                raise ValueError("a frame is missing")
            graph = graph or _rgb_graph(stream, frame.rotation)
            yield partial(_pixels, graph, frame, (height, width, 3))


def _rgb_graph(stream, rotation):
    """The filters that turn a frame upright and into RGB.

    They are in decord's order, since another one rounds otherwise.
    """
    graph = av.filter.Graph()
    with suppress(AttributeError):  # PyAV before 18 starts a thread per core
        graph.threads = 1
    directions = TRANSPOSES.get(rotation % 360, [])
    filters = [graph.add("transpose", direction) for direction in directions]
    filters += [graph.add("scale"), graph.add("format", "rgb24"), graph.add("buffersink")]
    graph.link_nodes(graph.add_buffer(template=stream), *filters).configure()
    return graph


def _pixels(graph, frame, shape):
    graph.push(frame)
    pixels = graph.pull().to_ndarray()
    if pixels.shape != shape:
        raise ValueError(f"a frame of shape {pixels.shape}")
    return pixels
