#!/usr/bin/env bash
# Arrange UCF-101 in the layout that train.py reads. Safe to run again: it does only what is missing.
#
#   datasets/prepare_ucf101.sh [DIR]        default: datasets/ucf-101
#
# makes DIR/<Class>/*.avi and ucfTrainTestlist/*.txt beside DIR from two archives. It downloads nothing: download the
# archives into DIR or beside it first. Exit status 2: something is missing or wrong, see the message.
#
#   EXPECT_VIDEOS=13320, EXPECT_CLASSES=101   what is expected, for a part of UCF-101
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit
fi
DIR=${1:-$(dirname "$0")/ucf-101}
DIR=${DIR%/}
[[ $DIR == -* ]] && DIR=./$DIR # else find and mkdir would read it as a flag
SPLITS=$(dirname "$DIR")/ucfTrainTestlist
UNPACKED=$DIR.unpacking
URL=https://www.crcv.ucf.edu/data/UCF101
EXPECT_VIDEOS=${EXPECT_VIDEOS:-13320}
EXPECT_CLASSES=${EXPECT_CLASSES:-101}

fail() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

list_videos() { find "$1" -mindepth 2 -maxdepth 2 -name '*.avi' 2>/dev/null; }
count_videos() { list_videos "$1" | wc -l | tr -d ' '; }
count_classes() { list_videos "$1" | sed 's|/[^/]*$||' | sort -u | wc -l | tr -d ' '; }
found_in() { echo "$(count_videos "$1") videos in $(count_classes "$1") classes"; }
EXPECTED="$EXPECT_VIDEOS videos in $EXPECT_CLASSES classes"

find_archive() {
  local folder
  for folder in "$DIR" "$(dirname "$DIR")"; do
    if [[ -f $folder/$1 ]]; then
      printf -v "$2" %s "$folder/$1"
      return
    fi
  done
  MISSING+=("$URL/$1")
}

# unpack ARCHIVE FOLDER TOOL...: unpacks with the first of the tools that is installed
unpack() {
  local archive=$1 folder=$2 tool
  shift 2
  for tool in "$@"; do
    command -v "$tool" >/dev/null || continue
    echo "unpacking $archive with $tool"
    case $tool in
      unrar) unrar x -idq -o+ "$archive" "$folder/" ;;
      unzip) unzip -q -o "$archive" -d "$folder" ;;
      bsdtar) bsdtar -xf "$archive" -C "$folder" ;;
      7z | 7zz) "$tool" x -y -bd "-o$folder" "$archive" >/dev/null ;;
    esac || fail "$tool can't unpack $archive: download it again, or install another tool: $*"
    return
  done
  fail "no tool to unpack $archive: install one of: $*"
}

# Check for both archives before the long work starts.
VIDEOS_READY=no MISSING=()
if [[ $(found_in "$DIR") == "$EXPECTED" ]]; then VIDEOS_READY=yes; fi
if [[ $VIDEOS_READY == no ]]; then find_archive UCF101.rar RAR; fi
if [[ ! -f $SPLITS/trainlist01.txt ]]; then find_archive UCF101TrainTestSplits-RecognitionTask.zip ZIP; fi
if [[ ${#MISSING[@]} != 0 ]]; then
  fail "$DIR holds $(found_in "$DIR"), expected $EXPECTED, and neither there nor beside it is the archive: download" \
    "${MISSING[*]} (see $URL.php) into $(dirname "$DIR") and run this again; for a part of the videos see --help"
fi

rm -rf "$UNPACKED"  # left by an interrupted run
trap 'rm -rf "$UNPACKED"' EXIT

if [[ -n ${ZIP:-} ]]; then
  mkdir -p "$UNPACKED"
  unpack "$ZIP" "$UNPACKED" unzip bsdtar 7z 7zz
  [[ -f $UNPACKED/ucfTrainTestlist/trainlist01.txt ]] ||
    fail "$ZIP holds no ucfTrainTestlist/trainlist01.txt: download $URL/$(basename "$ZIP") again"
  mkdir -p "$SPLITS"
  mv "$UNPACKED"/ucfTrainTestlist/*.txt "$SPLITS/"
fi

if [[ $VIDEOS_READY == no ]]; then
  mkdir -p "$UNPACKED" "$DIR"
  unpack "$RAR" "$UNPACKED" unrar bsdtar 7z 7zz
  [[ $(found_in "$UNPACKED/UCF-101") == "$EXPECTED" ]] ||
    fail "$RAR unpacks to $(found_in "$UNPACKED/UCF-101") in UCF-101/, expected $EXPECTED: download it again"
  for class in "$UNPACKED"/UCF-101/*; do
    there=$DIR/$(basename "$class")
    if [[ ! -e $there ]]; then
      mv "$class" "$there"
    elif [[ $(ls "$there") != "$(ls "$class")" ]]; then
      fail "$there exists and holds other files: move it away and run this again"
    fi
  done
  [[ $(found_in "$DIR") == "$EXPECTED" ]] ||
    fail "$DIR holds $(found_in "$DIR"), expected $EXPECTED: move other videos out of it"
fi

echo "$DIR: $EXPECTED, splits in $SPLITS"
