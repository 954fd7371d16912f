#!/bin/sh
# Makes gettysburg_address.flac from gettysburg_address.txt with flite's voice slt: 16 kHz, mono, no dither, so that the
# same flite gives the same samples. Debian and Ubuntu: apt-get install flite flac
#
# Text: Abraham Lincoln's Gettysburg Address (Bliss copy), public domain. Voice: CMU US slt, free for any use.
set -eu
cd "$(dirname "$0")"

wave=$(mktemp)
trap 'rm -f "$wave"' EXIT
# A quarter slower than the voice speaks by itself: near the pace at which such an address is read out.
flite -voice slt --setf duration_stretch=1.25 -f gettysburg_address.txt -o "$wave"
flac --silent --force --best --output-name=gettysburg_address.flac "$wave"
flac --silent --test gettysburg_address.flac
chmod 644 gettysburg_address.flac
