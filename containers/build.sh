#!/usr/bin/env bash
# Build the image without a Docker engine: debootstrap → base image → buildah. Needs root and the Debian
# packages buildah, crun and debootstrap. Usage: containers/build.sh [TAG [BUILDAH OPTION ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:-brainfm}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The machine's own Debian mirror, so that the image comes from where the machine's packages come from.
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep -v security | head -n 1)}
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$work/root" "$mirror"
container=$(buildah from scratch)
buildah add --quiet "$container" "$work/root" /
buildah commit --quiet "$container" localhost/brainfm-base
buildah rm "$container" >/dev/null
base=localhost/brainfm-base@$(buildah inspect --type image --format '{{.FromImageDigest}}' localhost/brainfm-base)
# Further arguments go to buildah, e.g. --volume for a local package index.
buildah build --isolation chroot --build-arg "BASE=$base" "${@:2}" --file containers/Dockerfile --tag "$tag" .
buildah images "$tag"
