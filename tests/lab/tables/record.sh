#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
#
# Inside the machine whose table is recorded, started by its systemd: sets up the situation that the
# kernel's command line names, writes the table to the second serial port, powers off.
set -eux
trap 'systemctl poweroff --force --force' EXIT
name=$(sed 's/.*record=\([^ ]*\).*/\1/' /proc/cmdline)
# shellcheck source=/dev/null
. "/record/$name.sh"
stty -F /dev/ttyS1 raw
/record/hv_vss_daemon list
/record/hv_vss_daemon list --table | sed "1a\\  \"about\": \"$about\"," >/dev/ttyS1
