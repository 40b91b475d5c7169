#!/usr/bin/env bash
# Unpack UCF-101 into the layout that train.py reads. Running it again is safe.
#
#   bash datasets/prepare_ucf101.sh [DIR]     default: datasets/ucf-101
#   EXPECT_VIDEOS=13320, EXPECT_CLASSES=101   expected numbers; change them for a part of UCF-101
#
# It makes DIR/<Class>/*.avi and, beside DIR, ucfTrainTestlist/*.txt from two archives. Download them into DIR or beside
# it first; the script downloads nothing. Exit status 2: something is missing or wrong, see the message.
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
EQM_HELP=$0
source "$(dirname "$0")/../scripts/common.sh"
DIR=${1:-$(dirname "$0")/ucf-101}
DIR=${DIR%/}
PARENT=$(dirname "$DIR") UNPACKED=$DIR.unpacking RAR='' ZIP=''
EXPECTED="${EXPECT_VIDEOS:-13320} videos in ${EXPECT_CLASSES:-101} classes"
found_in() { # FOLDER
  find -H "$1" -mindepth 2 -maxdepth 2 -name '*.avi' 2>/dev/null |
    awk -F/ '!seen[$(NF - 1)]++ { classes++ } END { print NR " videos in " classes + 0 " classes" }'
}
archive() { # NAME: print its path
  ls "$DIR/$1" 2>/dev/null || ls "$PARENT/$1" 2>/dev/null || complain "$DIR: holds $(found_in "$DIR"), expected $EXPECTED;" \
    "download $1 (see https://www.crcv.ucf.edu/data/UCF101.php) into $PARENT; for a part of the videos see --help"
}
unpack() { # ARCHIVE TOOL
  mkdir -p "$UNPACKED" && echo "unpacking $1"
  case $(command -v "$2" bsdtar 7z | head -n 1) in
    */unrar) unrar x -idq -o+ "$1" "$UNPACKED/" ;;
    */unzip) unzip -q -o "$1" -d "$UNPACKED" ;;
    */bsdtar) bsdtar -xf "$1" -C "$UNPACKED" ;;
    *) 7z x -y -bd "-o$UNPACKED" "$1" >/dev/null 2>&1 ;;
  esac || complain "$1: can't be unpacked; install $2, bsdtar or 7z, or download it again"
}

# Find both archives before the long work starts
[[ $(found_in "$DIR") == "$EXPECTED" ]] || RAR=$(archive UCF101.rar)
[[ -f $PARENT/ucfTrainTestlist/trainlist01.txt ]] || ZIP=$(archive UCF101TrainTestSplits-RecognitionTask.zip)
rm -rf "$UNPACKED" # left by an interrupted run
trap 'rm -rf "$UNPACKED"' EXIT
if [[ -n $ZIP ]]; then
  unpack "$ZIP" unzip
  mkdir -p "$PARENT/ucfTrainTestlist" && mv "$UNPACKED"/ucfTrainTestlist/*.txt "$PARENT/ucfTrainTestlist/"
fi
if [[ -n $RAR ]]; then
  unpack "$RAR" unrar
  [[ $(found_in "$UNPACKED/UCF-101") == "$EXPECTED" ]] ||
    complain "$RAR: holds $(found_in "$UNPACKED/UCF-101"), expected $EXPECTED; download it again"
  mkdir -p "$DIR"
  for class in "$UNPACKED"/UCF-101/*; do
    there=$DIR/$(basename "$class")
    [[ ! -e $there || $(ls "$there") == "$(ls "$class")" ]] || complain "$there: has other files; move it away"
    [[ -e $there ]] || mv "$class" "$there"
  done
  [[ $(found_in "$DIR") == "$EXPECTED" ]] || complain "$DIR: holds $(found_in "$DIR"), expected $EXPECTED; move others out"
fi
echo "$DIR: $EXPECTED, splits in $PARENT/ucfTrainTestlist"
