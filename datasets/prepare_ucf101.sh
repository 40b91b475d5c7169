#!/usr/bin/env bash
# Unpack UCF-101 into the layout that train.py reads. Running it again is safe.
#
#   bash datasets/prepare_ucf101.sh [DIR]        default: datasets/ucf-101
#
# It makes DIR/<Class>/*.avi and, beside DIR, ucfTrainTestlist/*.txt from two archives. Download them into DIR or beside
# it first; the script downloads nothing. Exit status 2: something is missing or wrong, see the message.
#
#   EXPECT_VIDEOS=13320, EXPECT_CLASSES=101   expected numbers; change them for a part of UCF-101
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
set -euo pipefail
HELP=$0
source "$(dirname "$0")/../scripts/common.sh"

DIR=${1:-$(dirname "$0")/ucf-101}
DIR=${DIR%/}
[[ $DIR == -* ]] && DIR=./$DIR # or find and mkdir would take it for a flag
PARENT=$(dirname "$DIR") UNPACKED=$DIR.unpacking
SPLITS=$PARENT/ucfTrainTestlist
URL=https://www.crcv.ucf.edu/data/UCF101
EXPECTED="${EXPECT_VIDEOS:-13320} videos in ${EXPECT_CLASSES:-101} classes"

found_in() { # FOLDER
  find "$1" -mindepth 2 -maxdepth 2 -name '*.avi' 2>/dev/null |
    awk -F/ '!seen[$(NF - 1)]++ { classes++ } END { print NR " videos in " classes + 0 " classes" }'
}

find_archive() { # NAME VARIABLE: set the variable to the archive's path
  local folder
  for folder in "$DIR" "$PARENT"; do
    if [[ -f $folder/$1 ]]; then
      printf -v "$2" %s "$folder/$1"
      return
    fi
  done
  MISSING+=("$URL/$1")
}

unpack() { # ARCHIVE TOOL...: unpack with the first tool that is installed
  local archive=$1 tool
  shift
  mkdir -p "$UNPACKED"
  for tool in "$@"; do
    command -v "$tool" >/dev/null || continue
    echo "unpacking $archive with $tool"
    case $tool in
      unrar) unrar x -idq -o+ "$archive" "$UNPACKED/" ;;
      unzip) unzip -q -o "$archive" -d "$UNPACKED" ;;
      bsdtar) bsdtar -xf "$archive" -C "$UNPACKED" ;;
      7z | 7zz) "$tool" x -y -bd "-o$UNPACKED" "$archive" >/dev/null ;;
    esac || complain "$archive: $tool can't unpack it; download it again, or install another tool: $*"
    return
  done
  complain "$archive: no tool to unpack it; install one of: $*"
}

# Find both archives before the long work starts
RAR='' ZIP='' MISSING=()
[[ $(found_in "$DIR") == "$EXPECTED" ]] || find_archive UCF101.rar RAR
[[ -f $SPLITS/trainlist01.txt ]] || find_archive UCF101TrainTestSplits-RecognitionTask.zip ZIP
if [[ ${#MISSING[@]} != 0 ]]; then
  complain "$DIR: holds $(found_in "$DIR"), expected $EXPECTED; the archive is neither in it nor beside it;" \
    "download ${MISSING[*]} (see $URL.php) into $PARENT and run this again; for a part of the videos see --help"
fi

rm -rf "$UNPACKED" # left by an interrupted run
trap 'rm -rf "$UNPACKED"' EXIT

if [[ -n $ZIP ]]; then
  unpack "$ZIP" unzip bsdtar 7z 7zz
  [[ -f $UNPACKED/ucfTrainTestlist/trainlist01.txt ]] ||
    complain "$ZIP: lacks ucfTrainTestlist/trainlist01.txt; download $URL/$(basename "$ZIP") again"
  mkdir -p "$SPLITS"
  mv "$UNPACKED"/ucfTrainTestlist/*.txt "$SPLITS/"
fi

if [[ -n $RAR ]]; then
  unpack "$RAR" unrar bsdtar 7z 7zz
  [[ $(found_in "$UNPACKED/UCF-101") == "$EXPECTED" ]] ||
    complain "$RAR: holds $(found_in "$UNPACKED/UCF-101") in UCF-101/, expected $EXPECTED; download it again"
  mkdir -p "$DIR"
  for class in "$UNPACKED"/UCF-101/*; do
    there=$DIR/$(basename "$class")
    if [[ ! -e $there ]]; then
      mv "$class" "$there"
    elif [[ $(ls "$there") != "$(ls "$class")" ]]; then
      complain "$there: exists with other files; move it away and run this again"
    fi
  done
  [[ $(found_in "$DIR") == "$EXPECTED" ]] ||
    complain "$DIR: holds $(found_in "$DIR"), expected $EXPECTED; move other videos out of it"
fi

echo "$DIR: $EXPECTED, splits in $SPLITS"
