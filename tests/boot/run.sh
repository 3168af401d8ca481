#!/usr/bin/env bash
# Boots a real systemd in a container without network, installs the Debian package in it and lets probe.py judge.
#
# Needs root, and on Debian 12 the packages systemd-container and mmdebstrap, which it installs. The root filesystem is
# made once (25 s); the whole of the rest takes about a minute. On a host whose cgroups it may not change it says so.
# Environment: BUILD_DIR (default build/boot), PACKAGE (default: the newest in dist/).
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "the boot test needs root: it starts a container" >&2; exit 1; }
./tests/system-packages.sh systemd-container mmdebstrap
build=${BUILD_DIR:-build/boot}
package=${PACKAGE:-$(ls -t dist/jouletrace_*.deb 2>/dev/null | head -1)}
[ -n "$package" ] || { echo "there is no package in dist/: run make deb" >&2; exit 1; }
machine=jouletrace-boot-$$
mkdir -p "$build"

if [ ! -e "$build/root.tar" ]; then
  mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Codename: bookworm' | head -1)
  mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,dbus,python3 bookworm "$build/root.tar.new" "$mirror"
  mv "$build/root.tar.new" "$build/root.tar"
fi
root=$(mktemp -d "$PWD/$build/root.XXXXXX")

# On a host with cgroup v1 that systemd does not rule, nspawn needs a group of its own in systemd's hierarchy.
groups=()
for hierarchy in unified systemd; do
  if [ -d "/sys/fs/cgroup/$hierarchy" ]; then groups+=("/sys/fs/cgroup/$hierarchy/$machine"); fi
done
cleanup() {
  for group in "${groups[@]}"; do [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} \; ; done
  rm -rf "$root"
}
trap cleanup EXIT
tar -xf "$build/root.tar" -C "$root" --exclude './dev/*'
install -D -m 644 "$package" "$root/opt/jouletrace.deb"
install -m 755 tests/boot/probe.py "$root/opt/probe.py"
install -m 644 tests/boot/probe.service "$root/etc/systemd/system/probe.service"
systemctl --root="$root" enable --quiet probe.service
sync # what was unpacked here must not be waited for by the installation, which is timed
for group in "${groups[@]}"; do
  mkdir -p "$group" || { echo "cannot make $group: this container may not change cgroups" >&2; exit 1; }
done
(
  for group in "${groups[@]}"; do echo "$BASHPID" > "$group/cgroup.procs"; done
  exec timeout 180 systemd-nspawn --directory="$root" --machine="$machine" --register=no --keep-unit --private-network \
    --console=read-only --boot
) > "$build/console.log" 2>&1 || echo "systemd-nspawn ended with status $?; see $build/console.log" >&2
[ -e "$root/opt/result.txt" ] || { tail -20 "$build/console.log" >&2; echo "the probe did not run" >&2; exit 1; }
cp "$root/opt/result.txt" "$build/result.txt"
cat "$build/result.txt"
tail -1 "$build/result.txt" | grep -q '^all is well$'
