#!/bin/sh
# Installs the named Debian packages that are missing, when it may (as root); else says what to install.
# A package counts as there when its program or file is: people install these in other ways too.
set -eu
missing=""
for package in "$@"; do
  case "$package" in
    gcc) command -v gcc >/dev/null || missing="$missing $package" ;;
    libc6-dev) [ -e /usr/include/stdio.h ] || missing="$missing $package" ;;
    prometheus) { command -v prometheus && command -v promtool; } >/dev/null || missing="$missing $package" ;;
    prometheus-alertmanager)
      { command -v prometheus-alertmanager && command -v amtool; } >/dev/null || missing="$missing $package" ;;
    systemd) command -v systemd-analyze >/dev/null || missing="$missing $package" ;;
    chromium | curl | npm | openssl | pngquant) command -v "$package" >/dev/null || missing="$missing $package" ;;
    *) dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package" ;;
  esac
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing$missing"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # shellcheck disable=SC2086  (a list of names)
  apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
  echo "These Debian packages are missing and only root may install them:$missing" >&2
  echo "Tests that need them will be skipped; run: sudo apt-get install$missing" >&2
fi
