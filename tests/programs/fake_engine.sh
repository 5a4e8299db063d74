#!/usr/bin/env bash
# Stands in for fmriprep, docker, apptainer, singularity and fmriprep-docker, under whichever of these names it is
# called. It records its arguments, answers the preflight's questions, and writes the tree in FAKE_TREE where a real
# fMRIPrep would have written. FAKE_* variables say how it ends.
name=$(basename "$0")
{ printf '%s\037' "$name" "$@"; printf '\n'; } >> "$FAKE_RECORD"
case "$*" in
  info*) echo "[name=seccomp${FAKE_ROOTLESS:+ name=rootless}]"; exit "${FAKE_DAEMON:-0}" ;;
  "image inspect"*) exit "${FAKE_NO_IMAGE:-0}" ;;
  version*) echo 27.0; exit 0 ;;
  "images -q"*) [ -n "$FAKE_NO_IMAGE" ] || echo 0123456789ab; exit 0 ;;
  *--entrypoint=free*) echo "Mem: ${FAKE_CONTAINER_MB:-4000} 0 0"; exit 0 ;;
  *--version) echo "fMRIPrep v${FAKE_VERSION:-25.2.7}"; exit 0 ;;
esac
[ -t 0 ] || [ -t 1 ] && echo "has a terminal" >> "$FAKE_RECORD"
read -r -t 5 line && echo "was given input: $line" >> "$FAKE_RECORD"

out=$2
flag=
for word in "$@"; do
  case "$flag" in -v | --volume | --bind) [ "${word##*:}" = /out ] && out=${word%:/out} ;; esac
  flag=$word
done

echo '251125-07:00:00,000 nipype.workflow INFO: [Node] Finished "fmriprep_25_2_wf.sub_01_wf.bold_fit_wf", elapsed time 1.0s.'
[ -z "$FAKE_LOG" ] || echo -e "$FAKE_LOG"
if [ -n "$FAKE_HANG" ]; then
  trap 'echo terminated > "$FAKE_HANG.ended"; exit 143' TERM
  echo $$ > "$FAKE_HANG"
  case "$*" in *"--participant-label 01"*) echo $$ > "$FAKE_HANG.sub-01" ;; *) echo $$ > "$FAKE_HANG.sub-02" ;; esac
  while true; do sleep 0.05; done
fi
cp -r "$FAKE_TREE/." "$out/"
[ -z "$FAKE_MISSING" ] || find "$out" -path "$FAKE_MISSING" -delete
[ -z "$FAKE_SIGNAL" ] || kill -"$FAKE_SIGNAL" $$
exit "${FAKE_CODE:-0}"
