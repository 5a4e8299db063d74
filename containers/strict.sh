#!/usr/bin/env bash
# Run a command in an image that buildah built as the strictest cluster would: any user id, root file system and input read-only, no network
# (a namespace with loopback only), nothing of this machine's environment. Needs root. strict.sh IMAGE INPUT OUTPUT COMMAND ...
# INPUT is seen as /srv, OUTPUT (made for the user id in STRICT_UID, 1234 where unset) as /mnt.
set -euo pipefail
image=$1 input=$(realpath "$2") output=$3
shift 3
user=${STRICT_UID:-1234}
mkdir -p "$output"
chown "$user:$user" "$output"
container=$(buildah from "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
mapfile -t variables < <(buildah inspect --type image --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$image" | grep .)
export root input output user
root=$(buildah mount "$container")
unshare --mount --net bash -euc '
  ip link set lo up
  mount --bind "$root" "$root"
  for name in null zero urandom; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
  mount --bind "$input" "$root/srv"
  mount -o remount,ro,bind "$root/srv"
  mount --bind "$(realpath "$output")" "$root/mnt"
  mount -t proc proc "$root/proc"
  mount -t tmpfs tmpfs "$root/tmp"
  chmod 1777 "$root/tmp"
  mount -o remount,ro,bind "$root"
  exec chroot --userspec="$user:$user" "$root" /usr/bin/env -i -C /mnt "$@"
' bash "${variables[@]}" "$@"
