#!/usr/bin/env bash
# Raw ABIDE I in BIDS form through DataLad (https://www.datalad.org); images are fetched per participant.
set -euo pipefail
datalad install --source ///abide/RawDataBIDS raw
cd raw
find . -maxdepth 2 -name 'sub-*' -type d | sed 's#^\./##' | sort > ../participants.txt
wc -l ../participants.txt
