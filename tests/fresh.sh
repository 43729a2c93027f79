#!/usr/bin/env bash
# Runs a command in a clone of HEAD on a newly installed, bare Debian 12 that has only make, git and python3.
#
#     sudo tests/fresh.sh [-u] 'make demo'       -u: as an ordinary user without sudo
#
# Needs root, debootstrap, and 4 GB in $FRESH (default /var/tmp/gemma_norm-fresh). The bare system is kept there for the
# next run; everything else is removed. These are taken over from this machine: Debian's mirror, the settings of apt and
# pip, local files and folders that pip's settings name, certificates, and name resolution. Nothing else is: no caches,
# no other variables, no GPUs, no packages.
set -euo pipefail

if [ "${1:-}" != --inside ]; then
  [ "$(id -u)" = 0 ] || { echo "tests/fresh.sh: needs root, to make a root file system" >&2; exit 2; }
  command -v debootstrap >/dev/null || { echo "tests/fresh.sh: apt-get install debootstrap" >&2; exit 2; }
  # The mounts below are made in a namespace of their own, so they vanish with this process, however it ends.
  exec unshare --mount --propagation private "$0" --inside "$@"
fi
shift

user=root home=/root
if [ "${1:-}" = -u ]; then shift; user=someone home=/home/someone; fi
command=${1:-make demo}
repository=$(cd "$(dirname "$0")/.." && pwd)
base=${FRESH:-/var/tmp/gemma_norm-fresh}
mkdir -p "$base"
find "$base" -maxdepth 1 -name 'work.*' -mmin +600 -exec rm -rf {} +  # left by a run that was killed
work=$(mktemp -d "$base/work.XXXXXX")
root=$work/root

clean() {
  awk -v root="$root/" 'index($2, root) == 1 { print $2 }' /proc/self/mounts | tac | xargs -r umount -l
  rm -rf --one-file-system "$work"
}
trap clean EXIT
trap 'exit 130' INT TERM

# Install the bare system, or unpack the one that was kept.
if [ ! -f "$base/bookworm.tar" ]; then
  mirror=$(sed -nE 's/^URIs: *([^ ]+).*/\1/p; s/^deb +(\[[^]]*\] +)?([^ ]+) +bookworm .*/\2/p' \
    /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -1 || true)
  debootstrap --variant=minbase --include=make,git,ca-certificates,python3 bookworm "$root" \
    "${mirror:-http://deb.debian.org/debian}" >"$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 2; }
  tar -C "$root" -cf "$work/tar" . && mv "$work/tar" "$base/bookworm.tar"
else
  mkdir "$root" && tar -C "$root" -xf "$base/bookworm.tar"
fi

# Let it reach the package servers.
apt-config dump Acquire >"$root/etc/apt/apt.conf.d/90fetch" 2>/dev/null || true
for path in /etc/resolv.conf /etc/hosts /etc/ssl /etc/pip.conf /etc/xdg/pip; do
  if [ ! -e "$path" ]; then continue; fi
  mkdir -p "$root$(dirname "$path")"
  cp -rL --remove-destination "$path" "$root$(dirname "$path")/" 2>/dev/null || true  # /etc/ssl has dangling links
done
mkdir -p "$root$home/.config"
cp -r ~/.config/pip "$root$home/.config/" 2>/dev/null || true
# The files and folders that pip's settings name. The packages of a local index are next to its pages, so the folder
# around the pages is taken.
named() {
  { env | sed -n 's/^PIP_//p'; cat /etc/pip.conf /etc/xdg/pip/pip.conf ~/.config/pip/pip.conf 2>/dev/null || true; } |
    sed -nE "s/^($1) *= *//Ip" | tr ' ' '\n' | sed 's,^file://,,'
}
{ named 'cert|constraint|find.links'; named '(extra.)?index.url' | sed 's,/[^/]*/*$,,'; } | sort -u >"$work/named"
while read -r path; do
  if [ -f "$path" ]; then mkdir -p "$root$(dirname "$path")" && cp -L "$path" "$root$path"
  elif [ -d "$path" ]; then mkdir -p "$root$path" && mount --bind -o ro "$path" "$root$path"; fi
done <"$work/named"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys" 2>/dev/null || true
for device in null zero full random urandom tty; do
  rm -f "$root/dev/$device" && touch "$root/dev/$device" && mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -p "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts" && ln -sf pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"

git -c safe.directory='*' clone -q --no-hardlinks "$repository" "$root/srv/app"
git -c safe.directory='*' -C "$repository" diff --quiet HEAD ||
  echo "fresh machine: uncommitted changes are not in it" >&2
if [ "$user" != root ]; then chroot "$root" useradd -d "$home" -s /bin/bash "$user"; fi
chroot "$root" chown -R "$user" /srv/app "$home"

kept=("HOME=$home" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 PIP_NO_CACHE_DIR=1)
mapfile -t -O "${#kept[@]}" kept < <(
  env | grep -iE '^(PIP_[A-Z_]*|(http|https|no|all)_proxy|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE)=' | grep -v CACHE)
start=$SECONDS code=0
chroot --userspec="$user" "$root" env -i "${kept[@]}" bash -c "cd /srv/app && $command" || code=$?
echo "fresh machine: '$command' ended with $code after $((SECONDS - start)) s"
exit "$code"
