#!/usr/bin/env bash
# Builds the container image, starts it as user 65532 on a read-only root without capabilities, and looks at what it is.
#
# Nothing is pulled: Debian root filesystems of the same Python stand in for the two public bases, of which the one for
# the run has no shell either. They are made once (2 minutes); the rest takes about a minute.
# Needs root, and on Debian 12 the packages buildah and mmdebstrap, which it installs.
# Environment: BUILD_DIR (default build/image), BUILDAH_OPTIONS (see deploy/container/build.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "the image test needs root: it mounts and changes root" >&2; exit 1; }
./tests/system-packages.sh buildah mmdebstrap curl
build=${BUILD_DIR:-build/image}
mkdir -p "$build"
build=$(cd "$build" && pwd)
largest_bytes=200000000
tag=localhost/jouletrace:test
export BUILDAH="buildah --root $build/storage --runroot $build/state --storage-driver vfs"

# NAME MMDEBSTRAP-OPTIONS...: makes localhost/NAME from Debian's packages.
stand_in() {
  local name=$1 context
  shift
  if $BUILDAH inspect --type image "localhost/$name" >/dev/null 2>&1; then return; fi
  local mirror
  mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Codename: bookworm' | head -1)
  context=$(mktemp -d "$build/context.XXXXXX")
  mmdebstrap --quiet "$@" bookworm "$context/root.tar" "$mirror"
  printf 'FROM scratch\nADD root.tar /\n' > "$context/Containerfile"
  $BUILDAH bud --quiet --isolation chroot --tag "localhost/$name" "$context" >/dev/null
  rm -rf "$context"
}
stand_in base-to-build --variant=minbase --include=python3,python3-pip
stand_in base-to-run --variant=extract --include=python3.11,ca-certificates,netbase,tzdata,libstdc++6 \
  --extract-hook='ln -s python3.11 "$1/usr/bin/python3"'

options=${BUILDAH_OPTIONS:-}
for file in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
  if [ -e "$file" ]; then options="$options --volume $file:$file:ro"; fi
done
BASE_IMAGE=localhost/base-to-run BUILD_IMAGE=localhost/base-to-build TAG=$tag \
  BUILDAH_OPTIONS="--quiet --pull-never $options" deploy/container/build.sh >/dev/null

container=$($BUILDAH from --pull-never "$tag")
root=$($BUILDAH mount "$container")
log=$build/daemon.log
daemon=
cleanup() {
  if [ -n "$daemon" ]; then kill -KILL "$daemon" 2>/dev/null || true; fi
  $BUILDAH umount "$container" >/dev/null
  $BUILDAH rm "$container" >/dev/null
}
trap cleanup EXIT
fail() { echo "$*" >&2; tail -20 "$log" >&2 2>/dev/null || true; exit 1; }

size=$(du --summarize --bytes "$root" | cut -f1)
[ "$size" -lt "$largest_bytes" ] || fail "the image has $size bytes, more than $largest_bytes"
for shell in sh bash dash busybox; do
  [ ! -e "$root/bin/$shell" ] || fail "there is a /bin/$shell in the image"
done
$BUILDAH inspect --type image "$tag" | python3 -c '
import json, sys
config = json.load(sys.stdin)["OCIv1"]["config"]
assert config["User"] == "65532:65532", config
assert config["Entrypoint"] == ["/usr/bin/jouletrace"] and config["Cmd"] == ["run"], config
assert list(config["ExposedPorts"]) == ["9841"] or list(config["ExposedPorts"]) == ["9841/tcp"], config
assert "NVIDIA_VISIBLE_DEVICES=all" in config["Env"], config
labels = config["Labels"]
assert labels["org.opencontainers.image.version"] == sys.argv[1], labels
assert labels["org.opencontainers.image.licenses"] == "Apache-2.0", labels
' "$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' exporter/jouletrace/__init__.py)"

port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
started=$(date +%s%N)
unshare --mount --propagation private sh -c '
  set -e
  root=$1 port=$2
  mount --bind "$root" "$root"
  mkdir -p "$root/proc"
  mount -t proc proc "$root/proc"
  mount -t tmpfs -o mode=700,uid=65532,gid=65532 tmpfs "$root/var/lib/jouletrace"
  mount -o remount,bind,ro "$root"
  exec env -i PATH=/usr/sbin:/usr/bin JOULETRACE_STATE_DIR=/var/lib/jouletrace chroot "$root" /usr/bin/python3 -c "
import ctypes, os, sys
for capability in range(64):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
os.setgroups([]); os.setresgid(65532, 65532, 65532); os.setresuid(65532, 65532, 65532)
os.execv(\"/usr/bin/jouletrace\", sys.argv[1:])" jouletrace run --demo --web.listen-address=127.0.0.1:$port
' sh "$root" "$port" > "$log" 2>&1 &
daemon=$!
metrics=
for _ in $(seq 150); do
  metrics=$(curl --silent --fail "http://127.0.0.1:$port/metrics" | grep '^jouletrace_gpu_energy_joules_total{') && break
  kill -0 "$daemon" || fail "the daemon has ended"
  sleep 0.1
done
[ -n "$metrics" ] || fail "no energy in /metrics"
first_scrape_ms=$((($(date +%s%N) - started) / 1000000))
grep -q '^Uid:.65532.65532.65532.65532$' "/proc/$daemon/status" || fail "it is not user 65532"
for set in CapEff CapPrm CapBnd; do
  grep -q "^$set:.0000000000000000$" "/proc/$daemon/status" || fail "it has capabilities in $set"
done
awk '$5 == "/" {found = $6 ~ /^ro/} END {exit !found}' "/proc/$daemon/mountinfo" || fail "its root can be written"
resident=$(awk '/^VmRSS/ {print $2 * 1024}' "/proc/$daemon/status")
kill -TERM "$daemon"
code=0
wait "$daemon" || code=$?
daemon=
[ "$code" = 0 ] || fail "it ended with $code after SIGTERM"
! grep -q Traceback "$log" || fail "there is a traceback in its log"
echo "image: $((size / 1000000)) MB unpacked; first energy after $first_scrape_ms ms; $((resident / 1048576)) MiB resident"
echo "all is well"
