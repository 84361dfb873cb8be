// SPDX-License-Identifier: GPL-2.0-only

//! The Debian packages on a stock Debian that has hyperv-daemons, with real dpkg, DKMS, udev and systemd.
//!
//! The module was built by DKMS beforehand (`tests/lab/dkms.sh`), since the guest has no compiler; here
//! DKMS installs it. Who serves is seen from the device's driver and from which unit is active.

use super::disks::Attached;
use super::{Case, When};
use anyhow::{ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Guest, Machine, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use hyperv_sim::{Exit, Guid, HostError};
use std::time::{Duration, SystemTime};

pub const CASES: &[Case] = &[
    case(
        "packages/install-to-purge",
        "beside hyperv-daemons: daemon, module, reboot, upgrade and removal amid backups, purge; good backups after \
         each",
        Machine::DEBIAN,
        install_to_purge,
    ),
    case(
        "packages/page",
        "the README's page for an administrator, line by line: install, reboot, a backup with MariaDB held by its hook, and \
         what it says of that",
        Machine::DEBIAN_AND_SERVER,
        page,
    ),
    case(
        "packages/kernel-upgrade",
        "Debian's next kernel is installed and booted, then the one before it again: DKMS has our module for both, and \
         each has the device",
        Machine::OLDER_DEBIAN,
        kernel_upgrade,
    ),
    case(
        "packages/kernel-upgrade-unbuilt",
        "the same where the module cannot be built: the stock driver serves, the journal says why, and what it says to \
         do is enough",
        Machine::OLDER_DEBIAN,
        kernel_upgrade_unbuilt,
    ),
    case(
        "packages/boot",
        "installed before the boot: the device is ours whichever module comes first, the rest stays with hv_utils",
        Machine::PACKAGES,
        boot,
    ),
    case(
        "packages/no-module",
        "a kernel without the module: the stock driver serves our daemon, and the journal says why",
        Machine::PACKAGES,
        no_module,
    ),
    case(
        "packages/disabled",
        "where an administrator disables ours, Debian's daemon serves, and an upgrade of ours leaves it alone",
        Machine::PACKAGES,
        disabled,
    ),
    case(
        "packages/masked",
        "where an administrator masks ours, Debian's daemon serves, and an upgrade of ours leaves it alone",
        Machine::PACKAGES,
        masked,
    ),
    case(
        "packages/upgrade-not-configured",
        "an upgrade to a daemon that cannot start with the configuration: the one before goes on serving, and what is wrong \
         is said; once that is mended it is replaced",
        Machine::PACKAGES,
        upgrade_not_configured,
    ),
    case(
        "packages/installed-amid-a-freeze",
        "our daemon is installed while Debian's holds a freeze: all is thawed, and the host's THAW is failed",
        Machine::DEBIAN,
        installed_amid_a_freeze,
    ),
    case(
        "packages/upgraded-amid-a-freeze",
        "our daemon is upgraded during a freeze: Debian's part of it waits for the root and the backup is good; where \
         the restart itself comes between, all is thawed, and the THAW is failed",
        Machine::DEBIAN,
        upgraded_amid_a_freeze,
    ),
    case(
        "packages/removed-amid-a-freeze",
        "our packages are removed during a freeze: waited for; where it does not last, no THAW is good",
        Machine::DEBIAN,
        removed_amid_a_freeze,
    ),
    case(
        "packages/blacklisted",
        "where an administrator blacklists our module, the stock driver keeps the device, and the journal says so",
        Machine::PACKAGES,
        blacklisted,
    ),
    case(
        "packages/mainline-daemon",
        "Linux's own daemon, compiled against our header from today's source, serves our module unchanged",
        Machine::PACKAGES,
        mainline_daemon,
    ),
    case(
        "packages/unknown-key",
        "a kernel that does not know the key of our module: the stock driver serves, the journal says what to do",
        Machine::SIGNED_PACKAGES,
        unknown_key,
    ),
    case(
        "packages/secure-boot",
        "Secure Boot: the stock driver serves until DKMS's key is enrolled, then ours; not signed it is refused, and \
         the journal says what to do",
        Machine::SECURE_BOOT,
        secure_boot,
    ),
];

const fn case(
    name: &'static str,
    about: &'static str,
    machine: Machine,
    run: fn(&Guest) -> Result<()>,
) -> Case {
    Case {
        name,
        about,
        machine,
        // dpkg, perl and systemd are slow in an emulated machine, and one case goes through all of it.
        per_round: Duration::from_secs(90),
        // `make test-packages`: what they install takes a while to build.
        when: When::Named,
        asks_our_module: false,
        compares: false,
        run,
    }
}

const OURS: &str = "hv_vss.service";
const THEIRS: &str = "hv-vss-daemon.service";
/// Their daemon for key-value pairs.
const KVP: &str = "hv-kvp-daemon.service";

/// Between two backups that something else goes on beside.
const PAUSE: Duration = Duration::from_secs(2);

/// Between an answer and the THAW.
const A_MOMENT: Duration = Duration::from_millis(500);

/// Where the packages lie.
const PACKAGES: &str = "/payload/packages";

/// What is missing of what DKMS would compile with is of no use here. Returns what it said.
fn install(guest: &Guest, packages: &str) -> Result<String> {
    let line = format!("cd {PACKAGES} && exec dpkg --install --force-depends {packages}");
    let dpkg = guest.spawn(&["sh", "-c", &line])?;
    // Debian's daemons are started by their package, and systemd waits 90 s for a device that is not there.
    let status = guest.wait(&dpkg, STEP * 6)?;
    let said = guest.output(&dpkg)?;
    ensure!(status.status == Some(0), "{line}: {status:?}\n{said}");
    Ok(said)
}

/// The driver that has the VSS device.
fn driver(guest: &Guest) -> Result<String> {
    driver_of(guest, guest.vss().instance())
}

/// The driver that has this device.
fn driver_of(guest: &Guest, device: Guid) -> Result<String> {
    let line = format!("basename $(readlink /sys/bus/vmbus/devices/{device}/driver)");
    Ok(guest.sh(&line)?.trim().to_owned())
}

/// Waits until `unit` serves, on the device of `module`, with the other unit inactive, and sees a good
/// backup with the root at a standstill.
fn serves(guest: &Guest, unit: &str, module: &str) -> Result<()> {
    serves_well(guest, unit, module).with_context(|| what_units_say(guest))
}

/// What the units of a guest are at, which may be another one than what the case began with, and the journal of its boot.
fn what_units_say(guest: &Guest) -> String {
    let line = format!(
        "systemctl --no-pager --full --lines=0 status {OURS} {THEIRS} dev-vmbus-hv_vss.device
         systemctl --no-pager list-jobs
         for process in /proc/[0-9]*; do
             [ -z \"$(tr -d '\\0' <$process/cmdline)\" ] ||
                 echo \"${{process##*/}} $(cat $process/wchan) $(tr '\\0' ' ' <$process/cmdline)\"
         done
         journalctl --no-pager --boot --output=short-monotonic --lines=80"
    );
    let ended = guest.try_sh(&line).map(|it| it.out);
    ended.unwrap_or_else(|error| format!("what its units are at is not known: {error:#}"))
}

fn serves_well(guest: &Guest, unit: &str, module: &str) -> Result<()> {
    let other = if unit == OURS { THEIRS } else { OURS };
    let is_active = |unit: &str| -> Result<bool> {
        let line = format!("systemctl show --property=ActiveState --value {unit}");
        Ok(guest.sh(&line)?.trim() == "active")
    };
    guest.wait_until(&format!("{unit} is active"), STEP, || is_active(unit))?;
    ensure!(
        !is_active(other)?,
        "{other} should not be active beside {unit}"
    );
    guest.vss().wait_open(STEP)?;
    equal("the device's driver", driver(guest)?.as_str(), module)?;
    guest.vss().agree(STEP)?;
    guest.wait_until("a daemon is there", STEP, || {
        Ok(guest.vss().hot_backup(STEP)?.status() == status::OK)
    })?;
    guest.writer_start("/var/tmp/writer")?;
    let seen = super::observe(guest);
    guest.writers_stop()?;
    equal(
        &format!("a backup by {unit} and {module}"),
        seen?,
        super::good(&["/var/tmp/writer"]),
    )
}

/// What came of it, unless the channel was closed before, as it is while the device changes hands.
fn unless_closed<T>(outcome: Result<T, HostError>) -> Result<Option<T>> {
    match outcome {
        Ok(it) => Ok(Some(it)),
        Err(HostError::NotOpen { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Runs `line` while the host takes one backup after the other, of which one at least is good. The others may fail;
/// none may hold it up, nothing may stay frozen, none goes without an answer while the channel is open, and none is
/// good whose freeze did not last.
fn amid_backups(guest: &Guest, line: &str) -> Result<()> {
    let vss = guest.vss();
    guest.writer_start_every("/var/tmp/amid", 20_000)?;
    let work = guest.spawn(&["sh", "-c", line])?;
    let mut good = 0;
    guest
        .wait_until(&format!("this ends amid backups: {line}"), STEP * 4, || {
            // Who has come to the device knows no version yet.
            let ready = vss.negotiated().is_some() || unless_closed(vss.agree(STEP))?.is_some();
            let freeze = match ready {
                true => unless_closed(vss.freeze(&[], STEP))?,
                false => None,
            };
            if freeze.is_some_and(|it| it.status() == status::OK) {
                // Time for whatever is at work to get between.
                std::thread::sleep(A_MOMENT);
                let stands = stands_still(guest)?;
                if let Some(thaw) = unless_closed(vss.thaw(STEP))? {
                    ensure!(
                        thaw.status() == status::FAIL || stands,
                        "THAW should fail, its freeze did not last: {line}"
                    );
                    good += usize::from(thaw.status() == status::OK);
                }
            }
            // Back to back they would hold up the work for most of its time: it writes to the root.
            std::thread::sleep(PAUSE);
            Ok(guest.has_ended(&work)?)
        })
        .with_context(|| what_units_say(guest))?;
    guest.writers_stop()?;
    let ended = guest.wait(&work, STEP)?;
    let output = guest.output(&work)?;
    ensure!(
        ended.status == Some(0),
        "this should succeed amid backups: {line}\n{output}"
    );
    ensure!(good > 0, "no backup was good during: {line}");
    Ok(())
}

/// Whether every writer has been inside one write for longer than a busy machine takes for it.
fn stands_still(guest: &Guest) -> Result<bool> {
    Ok(guest.writers()?.iter().all(|it| it.in_write_us > 100_000))
}

/// What starts their daemon where a backup broke as ours was removed, once its THAW is over.
const LATER: &str = "hv_vss_removed";

/// Waits until ours is removed and theirs serves, or has yet to.
fn theirs_is_to_come(guest: &Guest) -> Result<()> {
    let line = format!(
        "systemctl --quiet is-active {THEIRS} || systemctl --quiet is-active {LATER}.timer"
    );
    guest.wait_until("theirs serves or is to serve later", STEP, || {
        Ok(guest.try_sh(&line)?.status == Some(0))
    })
}

/// Does now what is to be done then.
fn not_so_late(guest: &Guest) -> Result<()> {
    let line = format!(
        "! systemctl --quiet is-active {LATER}.timer ||
         {{ systemctl start {LATER}.service && systemctl stop {LATER}.timer; }}"
    );
    guest.sh(&line).map(drop)
}

/// What hv_utils keeps: shutdown, the heartbeat, the time and, with their daemon where it is installed, key-value pairs.
fn rest_is_stock(guest: &Guest) -> Result<()> {
    let host = guest.host();
    host.heartbeat().wait_open(STEP)?;
    let (sequence, _) = host.heartbeat().beat(7, STEP)?;
    equal("the heartbeat's answer to 7", sequence, 8)?;
    ensure!(host.shutdown().is_open(), "shutdown should be open");
    host.timesync().wait_open(STEP)?;
    let set = host.timesync().set(SystemTime::now(), STEP)?;
    answered("time sync", &set, status::OK)?;
    let kvp = host.kvp();
    kvp.wait_open(STEP)?;
    equal(
        "the driver of KVP",
        driver_of(guest, kvp.instance())?.as_str(),
        "hv_utils",
    )?;
    if guest.try_sh(&format!("systemctl cat {KVP}"))?.status == Some(0) {
        // Before it is there nothing is answered.
        guest.wait_until(&format!("{KVP} is active"), STEP, || {
            let line = format!("systemctl --quiet is-active {KVP}");
            Ok(guest.try_sh(&line)?.status == Some(0))
        })?;
        kvp.agree_once(STEP)?;
    }
    Ok(())
}

/// Back to a guest without modules and daemons.
fn end(guest: &Guest) -> Result<()> {
    guest.try_sh(&format!("systemctl stop {OURS} {THEIRS} {KVP}"))?;
    // A helper may hold the device for a moment longer.
    guest.wait_until("the modules can be unloaded", STEP, || {
        let unload = "for module in hv_vss hv_utils; do
                          [ ! -e /sys/module/$module ] || rmmod $module || exit 1
                      done";
        Ok(guest.try_sh(unload)?.status == Some(0))
    })
}

/// Shuts the guest down as an administrator does.
fn power_off(guest: &Guest) -> Result<()> {
    guest.ends()?;
    // It does not answer that.
    let _ = guest.spawn(&["systemctl", "poweroff"]);
    let exit = guest.vm().wait_exit(STEP * 2)?;
    equal("how the guest ended", exit, Exit::PowerOff)?;
    guest.close()
}

/// The same, and boots another from what is on its disk then.
fn reboot(guest: &Guest) -> Result<Guest> {
    reboot_as(guest, guest.machine())
}

/// The same, as one of another kind.
fn reboot_as(guest: &Guest, machine: Machine) -> Result<Guest> {
    reboot_with(guest, machine, |_| Ok(())).map(|(guest, ())| guest)
}

/// The same, with what the host `brings` as soon as there is an agent, which the boot may wait for.
fn reboot_with<T>(
    guest: &Guest,
    machine: Machine,
    brings: impl FnOnce(&Guest) -> Result<T>,
) -> Result<(Guest, T)> {
    power_off(guest)?;
    let disk = guest.root_disk().context("its root is elsewhere")?;
    let guest = guest.start_as(machine, disk.snapshot()?)?;
    let brought = brings(&guest)?;
    // The agent is there long before whatever the boot starts, and of that what belongs to a device begins when udev
    // has come to it.
    let has_ended =
        "udevadm settle --timeout=0 && systemctl list-jobs --no-legend | grep -c . || true";
    guest
        .wait_until("the boot has ended", STEP * 4, || {
            Ok(guest.sh(has_ended)?.trim() == "0")
        })
        .with_context(|| what_units_say(&guest))?;
    Ok((guest, brought))
}

fn install_to_purge(guest: &Guest) -> Result<()> {
    install(guest, "dkms_*.deb hyperv-daemons_*.deb")?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, THEIRS, "hv_utils")?;
    rest_is_stock(guest)?;
    let before = files(guest)?;

    // The daemon alone is a whole product.
    install(guest, "hv-vss-daemon_*.deb")?;
    serves(guest, OURS, "hv_utils")?;
    let units = guest.sh("dpkg -L hyperv-daemons | sed -n 's|.*/\\(hv-.*\\)\\.service$|\\1|p'")?;
    let others: Vec<&str> = units.lines().filter(|it| !THEIRS.starts_with(it)).collect();
    // Those of KVP and of fcopy, which go by more than one name.
    equal("their other daemons", others.len(), 2)?;
    for unit in others {
        let line = format!("systemctl show --property=LoadState,DropInPaths {unit}");
        equal(
            unit,
            guest.sh(&line)?.trim(),
            "LoadState=loaded\nDropInPaths=",
        )?;
    }

    // The module has the device at once, and after the next boot.
    install(guest, "hv-vss-dkms_*.deb")?;
    serves(guest, OURS, "hv_vss")?;
    ensure!(
        guest.host().kvp().negotiated().is_some(),
        "KVP should not have been closed meanwhile"
    );
    rest_is_stock(guest)?;
    let guest = &reboot(guest)?;
    serves(guest, OURS, "hv_vss")?;
    rest_is_stock(guest)?;

    // A later version, with another default configuration; what an administrator has added stays.
    let drop_in = "/etc/hv_vss/daemon.toml.d/test.toml";
    guest.sh(&format!("echo parallel = 16 >{drop_in}"))?;
    let next = format!(
        "cp {PACKAGES}/next/*.dkms.tar.gz /usr/share/hv_vss-dkms/ &&
         cd {PACKAGES}/next && dpkg --install --force-depends *.deb"
    );
    let old = version(guest)?;
    amid_backups(guest, &next)?;
    serves(guest, OURS, "hv_vss")?;
    let after = version(guest)?;
    ensure!(after != old, "the version should be new: {after}");
    let kernel = guest.kernel().release.clone();
    equal(
        "DKMS's modules",
        modules(guest)?,
        vec![(after.clone(), kernel)],
    )?;
    let last = guest.sh("tail -n 1 /etc/hv_vss/daemon.toml")?;
    equal(
        "the default configuration",
        last.trim(),
        format!("# of version {after}").as_str(),
    )?;
    equal(
        "the drop-in",
        guest.read(drop_in)?.as_str(),
        "parallel = 16\n",
    )?;
    guest.sh(&format!("rm {drop_in}"))?;
    // Its module comes with the next boot.
    let guest = &reboot(guest)?;
    serves(guest, OURS, "hv_vss")?;

    // As the README has it; this one fails no backup, whatever is there of its server.
    guest.sh("ln -s /usr/share/hv_vss/hooks/postgresql /etc/hv_vss/hooks.d/50-postgresql")?;
    amid_backups(guest, "dpkg --remove hv-vss-dkms hv-vss-daemon")?;
    theirs_is_to_come(guest)?;
    not_so_late(guest)?;
    serves(guest, THEIRS, "hv_utils")?;
    ensure!(
        guest.try_sh("grep -q '^hv_vss ' /proc/modules")?.status == Some(1),
        "hv_vss should be unloaded"
    );
    rest_is_stock(guest)?;

    guest.sh("dpkg --purge hv-vss-dkms hv-vss-daemon 2>&1")?;
    equal(
        "what is left after purge",
        files(guest)?.as_str(),
        before.as_str(),
    )?;
    guest.close()
}

/// The kernels of a machine before its upgrade.
struct Kernels {
    older: String,
    newer: String,
}

/// Installs ours on the older kernel, where the newer one is not installed yet.
fn before_the_upgrade(guest: &Guest) -> Result<Kernels> {
    let older = guest.kernel().release.clone();
    let all = guest.sh("ls /usr/lib/modules")?;
    let newer = all.lines().find(|it| *it != older);
    let newer = newer.context("there should be another kernel")?.to_owned();
    guest.sh(&format!("mv /usr/lib/modules/{newer} /root/"))?;
    install(guest, "dkms_*.deb hv-vss-daemon_*.deb hv-vss-dkms_*.deb")?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, OURS, "hv_vss")?;
    rest_is_stock(guest)?;
    Ok(Kernels { older, newer })
}

/// Brings what DKMS wants to see of a kernel's headers, and puts into its tree what it would have built from them: its
/// own command for that takes no further kernel of a version that it knows.
fn bring_headers(guest: &Guest, kernel: &str) -> Result<()> {
    let version = version(guest)?;
    let line = format!(
        "mkdir -p /usr/lib/modules/{kernel}/build/include &&
         tar --extract --warning=no-timestamp --file {PACKAGES}/{kernel}/hv_vss-*.dkms.tar.gz \
             --directory /var/lib/dkms/hv_vss/{version} --strip-components=2 ./dkms_main_tree/{kernel}"
    );
    guest.sh(&line).map(drop)
}

/// Unpacks a kernel's own package of Debian, whose files are large and there already. Whatever DKMS has built for that
/// kernel is gone then.
fn unpack_kernel(guest: &Guest, kernel: &str) -> Result<()> {
    let folder = format!("/usr/lib/modules/{kernel}");
    let line = format!(
        "mv /root/{kernel} {folder} && cd {PACKAGES}/{kernel} &&
         dpkg --unpack --force-depends linux-base_*.deb linux-image-*.deb 2>&1"
    );
    guest.sh(&line).map(drop)
}

/// Configures it, which has DKMS build and install. Returns what that said.
fn configure_kernel(guest: &Guest, kernel: &str) -> Result<String> {
    guest.sh(&format!(
        "dpkg --configure --force-depends linux-base linux-image-{kernel} 2>&1"
    ))
}

fn kernel_upgrade(guest: &Guest) -> Result<()> {
    let Kernels { older, newer } = before_the_upgrade(guest)?;
    unpack_kernel(guest, &newer)?;
    bring_headers(guest, &newer)?;
    configure_kernel(guest, &newer)?;
    let version = version(guest)?;
    let mut both = modules(guest)?;
    both.sort();
    equal(
        "DKMS's modules",
        both,
        vec![(version.clone(), older.clone()), (version, newer.clone())],
    )?;
    serves(guest, OURS, "hv_vss")?;

    let guest = &reboot_as(guest, Machine::DEBIAN)?;
    equal("the kernel", &guest.kernel().release, &newer)?;
    serves(guest, OURS, "hv_vss")?;
    rest_is_stock(guest)?;

    // An administrator picks the older one.
    let guest = &reboot_as(guest, Machine::OLDER_DEBIAN)?;
    equal("the kernel", &guest.kernel().release, &older)?;
    serves(guest, OURS, "hv_vss")?;
    guest.close()
}

fn kernel_upgrade_unbuilt(guest: &Guest) -> Result<()> {
    let Kernels { newer, .. } = before_the_upgrade(guest)?;
    unpack_kernel(guest, &newer)?;
    let said = configure_kernel(guest, &newer)?;
    ensure!(
        said.contains("headers for this kernel do not seem to be installed"),
        "DKMS should have been asked, and say that it cannot: {said}"
    );

    let guest = &reboot_as(guest, Machine::DEBIAN)?;
    equal("the kernel", &guest.kernel().release, &newer)?;
    serves(guest, OURS, "hv_utils")?;
    rest_is_stock(guest)?;
    let build = format!("dkms autoinstall -k {newer}");
    let take = "/usr/libexec/hv_vss_hand_over take";
    let line = format!(
        "hv_vss is not built for kernel {newer}: its headers are missing; install linux-headers-{newer}; \
         then run '{build}' and '{take}'"
    );
    journal_says(guest, &line)?;
    check_warns(guest, &line)?;

    bring_headers(guest, &newer)?;
    guest.sh(&format!("{build} && {take}"))?;
    serves(guest, OURS, "hv_vss")?;
    rest_is_stock(guest)?;
    guest.close()
}

/// The commands of the README's page for an administrator, each in one line.
fn commands_of_the_page() -> Result<Vec<String>> {
    let text = include_str!("../../../../README.md");
    let page = text.split("\n## ");
    let mut page = page.filter(|it| it.starts_with("In a guest on Hyper-V\n"));
    let page = page.next().context("the README has no such page")?;
    let lines = page.lines().filter_map(|it| it.strip_prefix("    "));
    let mut commands = vec![String::new()];
    for line in lines {
        let line = line.split('#').next().unwrap_or_default().trim();
        let last = commands.last_mut().context("there is one at least")?;
        match line.strip_suffix('\\') {
            Some(begun) => last.push_str(begun),
            None => {
                last.push_str(line);
                commands.push(String::new());
            }
        }
    }
    commands.retain(|it| !it.is_empty());
    Ok(commands)
}

/// With and without what is in brackets.
fn variants(command: &str) -> Vec<String> {
    match command.split_once(" [") {
        None => vec![command.to_owned()],
        Some((before, option)) => {
            let option = option.trim_end_matches(']').replace(" F", " /run/F");
            vec![before.to_owned(), format!("{before} {option}")]
        }
    }
}

/// Brings apt, which the guest has not, with what it needs of its own; on a small disk nothing of that is kept twice. The
/// lists of a mirror it has none.
fn bring_apt(guest: &Guest) -> Result<()> {
    let line = format!(
        "cd {PACKAGES}/apt && set -- && for file in *.deb; do
             case $(dpkg-query --show --showformat '${{db:Status-Status}}' ${{file%%_*}} 2>/dev/null) in
             installed) ;;
             *) set -- \"$@\" $file ;;
             esac
         done && dpkg --install \"$@\" 2>&1 && rm -r {PACKAGES}/apt"
    );
    guest.sh(&line).map(drop)
}

/// Where an administrator has put a server of MariaDB.
const SERVER: &str = "/srv/server";

/// The disk of that server, as `content` has it.
fn attach_server(guest: &Guest, content: Image, len: u64) -> Result<Attached> {
    Attached::new(guest, 0, 1, len.div_ceil(1 << 20), content)
}

/// Has the server run, now and after each boot.
fn start_server(guest: &Guest) -> Result<()> {
    let libraries = format!("LD_LIBRARY_PATH={SERVER}/usr/lib/x86_64-linux-gnu");
    let line = format!(
        "mkdir {SERVER} && echo 'LABEL=mariadb {SERVER} ext4 nofail 0 0' >>/etc/fstab &&
         echo mysql:x:101:101::/nonexistent:/bin/false >>/etc/passwd && echo mysql:x:101: >>/etc/group &&
         printf '[client]\\nskip-ssl\\n' >/root/.my.cnf &&
         printf '#!/bin/sh\\n{libraries} exec {SERVER}/usr/bin/mariadb \"$@\"\\n' >/usr/local/bin/mariadb &&
         chmod 755 /usr/local/bin/mariadb &&
         start() {{ systemctl daemon-reload && systemctl enable --now mariadb 2>&1; }} &&
         cat >/etc/systemd/system/mariadb.service <<'.' && {{ start || ! journalctl --no-pager --unit mariadb; }}
[Unit]
RequiresMountsFor={SERVER}
[Service]
Type=notify
User=mysql
Environment={libraries}
RuntimeDirectory=mysqld
ExecStart={SERVER}/usr/sbin/mariadbd --no-defaults --datadir={SERVER}/srv/mariadb \\
    --lc-messages-dir={SERVER}/usr/share/mariadb --character-sets-dir={SERVER}/usr/share/mariadb/charsets \\
    --socket=/run/mysqld/mysqld.sock --skip-networking --skip-ssl --innodb-buffer-pool-size=32M \\
    --innodb-log-file-size=4M --innodb-data-file-path=ibdata1:4M:autoextend --innodb-autoextend-increment=1
[Install]
WantedBy=multi-user.target
."
    );
    guest.sh(&line).map(drop)
}

/// Whether the server takes a new database within a second; that of which no table is made yet is in memory
/// and in its log.
fn server_takes(guest: &Guest, name: &str) -> Result<bool> {
    let line = format!(
        "/usr/local/bin/mariadb -e 'SET lock_wait_timeout = 1; CREATE DATABASE {name}; DROP DATABASE {name}'"
    );
    let ended = guest.try_sh(&line)?;
    match ended.status {
        Some(0) => Ok(true),
        // ER_LOCK_WAIT_TIMEOUT
        _ if ended.err.contains("ERROR 1205 ") => Ok(false),
        _ => Err(anyhow::anyhow!("{line}: {ended:?}")),
    }
}

/// What the administrator did, line by line, and what was said to that.
struct Record<'a> {
    guest: &'a Guest,
    text: String,
}

impl Record<'_> {
    /// Adds a line and what it said. Kept as far as it came.
    fn add(&mut self, command: &str, said: &[&str]) -> Result<()> {
        self.text.push_str(&format!("# {command}\n"));
        for said in said
            .iter()
            .map(|it| it.trim_end())
            .filter(|it| !it.is_empty())
        {
            self.text.push_str(said);
            self.text.push('\n');
        }
        self.guest.keep("page.txt", &self.text)
    }

    /// Has it run as it stands, where the packages lie.
    fn follow(&mut self, command: &str) -> Result<String> {
        let line = format!("cd {PACKAGES} && export DEBIAN_FRONTEND=noninteractive && {command}");
        let process = self.guest.spawn(&["sh", "-c", &line])?;
        let ended = self.guest.wait(&process, STEP * 6)?;
        let said = self.guest.output(&process)?;
        self.add(command, &[&said])?;
        ensure!(ended.status == Some(0), "{command}: {ended:?}\n{said}");
        Ok(said)
    }

    /// Installs what a line of apt names. What it would have from a mirror is on none here: of our packages it is the
    /// files, which dpkg installs, without what DKMS would compile with. That was done beforehand.
    fn install(&mut self, command: &str) -> Result<()> {
        let words = command.split_whitespace().skip(2);
        let (files, others): (Vec<_>, Vec<_>) = words.partition(|it| it.starts_with("./"));
        // Whether they are of this kernel, the machine that has a mirror sees (`tests/lab/dkms.sh`).
        let names = ["linux-image-", "linux-headers-", "linux-source"];
        let are_named = names.map(|name| others.iter().any(|it| it.starts_with(name)));
        ensure!(
            are_named == [true; 3] && others.len() == names.len(),
            "what else it names should be the kernel, and what DKMS compiles with: {others:?}"
        );
        let said = install(self.guest, &format!("dkms_*.deb {}", files.join(" ")))?;
        let missing = format!("(not on this machine: {})", others.join(" "));
        self.add(command, &[&said, &missing])
    }
}

fn page(guest: &Guest) -> Result<()> {
    bring_apt(guest)?;
    let mut content = Image::default();
    let bytes = guest.server_disk()?;
    let len = bytes.len() as u64;
    let mut at = 0;
    for part in bytes.chunks(1 << 16) {
        // The rest of it takes no memory.
        if part.iter().any(|it| *it != 0) {
            content.write(at, part);
        }
        at += part.len() as u64;
    }
    drop(bytes);
    let data = attach_server(guest, content, len)?;
    data.node(guest)?;
    start_server(guest)?;

    let mut record = Record {
        guest,
        text: String::new(),
    };
    record.follow("apt install ./hyperv-daemons_*.deb")?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, THEIRS, "hv_utils")?;
    let commands = commands_of_the_page()?;
    let first_look = commands.iter().position(|it| it.starts_with("hv_vss "));
    let (prepares, looks) = commands.split_at(first_look.context("the page should name hv_vss")?);
    ensure!(
        prepares.len() == 7 && looks.len() >= 7,
        "the page should have been understood: {prepares:?}, {looks:?}"
    );
    for command in prepares {
        // Whether a mirror has what the page says, the machine that has one sees (`tests/lab/dkms.sh`).
        if command == "apt update" {
            record.add(command, &["(no mirror is there)"])?;
        } else if command == "reboot" {
            record.add(command, &["(when the hook is there, too)"])?;
        } else if command.contains(" linux-headers-") {
            record.install(command)?;
        } else {
            record.follow(command)?;
        }
    }
    // As for the QEMU guest agent.
    guest.sh(
        "printf '#!/bin/sh\\necho $1 >>/run/called\\n' >/etc/hv_vss/hooks.d/10-note
         chmod 755 /etc/hv_vss/hooks.d/10-note",
    )?;
    let text = record.text;
    let back = |guest: &Guest| attach_server(guest, data.disk.snapshot()?, len);
    let (guest, _data) = &reboot_with(guest, guest.machine(), back)?;
    let mut record = Record { guest, text };

    serves(guest, OURS, "hv_vss")?;
    // Where the boot did not wait for its disk.
    let start = "systemctl start mariadb 2>&1 ||
                 ! journalctl --no-pager --boot --unit mariadb --unit srv-server.mount";
    let server = guest.spawn(&["sh", "-c", start])?;
    let ended = guest.wait(&server, STEP * 4)?;
    let said = guest.output(&server)?;
    ensure!(ended.status == Some(0), "the server should be back: {said}");
    guest.sh("rm /run/called")?;
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let taken = server_takes(guest, "amid_the_backup");
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    ensure!(
        !taken?,
        "the server should be held by its hook during the backup"
    );
    guest.wait_until("the hooks were called for both", STEP, || {
        Ok(guest.read("/run/called")? == "freeze\nthaw\n")
    })?;
    guest.wait_until("the server is let go", STEP, || {
        server_takes(guest, "after_the_backup")
    })?;
    let mut history = String::new();
    for command in looks.iter().flat_map(|it| variants(it)) {
        let said = record.follow(&command)?;
        if command == "hv_vss history" {
            history = said;
        }
    }
    ensure!(
        history.contains(" good "),
        "the history should have the backup: {history}"
    );
    ensure!(
        guest.read("/run/F")?.starts_with("<svg"),
        "the timeline should be a drawing"
    );
    guest.close()
}

/// The version of our packages.
fn version(guest: &Guest) -> Result<String> {
    let show = "dpkg-query --show --showformat '${Version}\\n' hv-vss-daemon hv-vss-dkms | uniq";
    Ok(guest.sh(show)?.trim().to_owned())
}

/// The modules of ours that DKMS has installed: version and kernel.
fn modules(guest: &Guest) -> Result<Vec<(String, String)>> {
    let text = guest.sh("dkms status -m hv_vss")?;
    let installed = text.lines().filter(|it| it.contains(": installed"));
    let fields = installed.filter_map(|it| {
        let mut fields = it.strip_prefix("hv_vss/")?.split(", ");
        Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
    });
    Ok(fields.collect())
}

/// The files that have anything to do with us, by name.
fn files(guest: &Guest) -> Result<String> {
    guest.sh("find /etc /usr /var /run /opt -xdev -name '*hv[-_]vss*' ! -name '*.dkms.tar.gz' ! -path '/sys/*' | sort")
}

fn boot(guest: &Guest) -> Result<()> {
    serves(guest, OURS, "hv_vss")?;
    rest_is_stock(guest)?;
    // hv_utils comes first by name, and brings hv_vss.
    end(guest)?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, OURS, "hv_vss")?;
    // hv_utils has the device already, as from an initramfs, when udev sees it.
    end(guest)?;
    guest.sh("insmod $(modinfo -n hv_utils)")?;
    guest.vss().wait_open(STEP)?;
    equal(
        "the driver before udev",
        driver(guest)?.as_str(),
        "hv_utils",
    )?;
    cold_plug(guest)?;
    serves(guest, OURS, "hv_vss")?;
    rest_is_stock(guest)?;
    let overridden = guest.sh("cat /sys/bus/vmbus/devices/*/driver_override | sort -u")?;
    equal("what is overridden", overridden.trim(), "(null)")?;
    end(guest)
}

/// What udev does with the device when the real root takes over.
fn cold_plug(guest: &Guest) -> Result<()> {
    let device = guest.vss().instance();
    let line = format!("udevadm trigger --settle --action=add /sys/bus/vmbus/devices/{device}");
    guest.sh(&line).map(drop)
}

/// Waits until the journal has this of the hand-over.
fn journal_says(guest: &Guest, line: &str) -> Result<()> {
    let mut text = String::new();
    let said = guest.wait_until(&format!("the journal says: {line}"), STEP, || {
        text = guest.sh("journalctl --quiet --boot --identifier hv_vss_hand_over")?;
        Ok(text.contains(line))
    });
    said.with_context(|| format!("it says {text:?}"))
}

/// What an operator is told who asks.
fn check_warns(guest: &Guest, line: &str) -> Result<()> {
    let ended = guest.try_sh("hv_vss check")?;
    ensure!(
        ended.status == Some(7) && ended.out.contains(line),
        "check should warn: {line}; it was: {ended:?}"
    );
    Ok(())
}

fn no_module(guest: &Guest) -> Result<()> {
    // The case before has left no module loaded.
    cold_plug(guest)?;
    serves(guest, OURS, "hv_vss")?;
    end(guest)?;
    guest.sh("mv $(modinfo -n hv_vss) /root/ && depmod")?;
    cold_plug(guest)?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, OURS, "hv_utils")?;
    let release = guest.sh("uname -r")?;
    let line = format!(
        "hv_vss is not built for kernel {}: its headers",
        release.trim()
    );
    journal_says(guest, &line)?;
    check_warns(guest, &line)?;
    // Put back, it is taken into use.
    guest
        .sh("mv /root/hv_vss.ko* /usr/lib/modules/$(uname -r)/updates/dkms/ && depmod")
        .context("the module was in updates/dkms")?;
    cold_plug(guest)?;
    serves(guest, OURS, "hv_vss")?;
    end(guest)
}

fn disabled(guest: &Guest) -> Result<()> {
    // The case before has left no module loaded.
    cold_plug(guest)?;
    serves(guest, OURS, "hv_vss")?;
    guest.sh(&format!(
        "systemctl disable --now {OURS} 2>&1 && systemctl start {THEIRS}"
    ))?;
    serves(guest, THEIRS, "hv_vss")?;
    install(guest, "hv-vss-daemon_*.deb")?;
    serves(guest, THEIRS, "hv_vss")?;
    guest.sh(&format!(
        "systemctl stop {THEIRS} && systemctl enable --now {OURS} 2>&1"
    ))?;
    serves(guest, OURS, "hv_vss")?;
    end(guest)
}

fn masked(guest: &Guest) -> Result<()> {
    // The case before has left no module loaded.
    cold_plug(guest)?;
    serves(guest, OURS, "hv_vss")?;
    guest.sh(&format!(
        "systemctl mask --now {OURS} 2>&1 && systemctl start {THEIRS}"
    ))?;
    serves(guest, THEIRS, "hv_vss")?;
    install(guest, "hv-vss-daemon_*.deb")?;
    serves(guest, THEIRS, "hv_vss")?;
    guest.sh(&format!(
        "systemctl stop {THEIRS} && systemctl unmask {OURS} 2>&1 && systemctl start {OURS}"
    ))?;
    serves(guest, OURS, "hv_vss")?;
    // With ours in force, theirs stays away again.
    guest.sh(&format!("systemctl start {THEIRS}"))?;
    serves(guest, OURS, "hv_vss")?;
    end(guest)
}

fn upgrade_not_configured(guest: &Guest) -> Result<()> {
    const BAD: &str = "/etc/hv_vss/daemon.toml.d/test.toml";
    // The case before has left no module loaded.
    cold_plug(guest)?;
    serves(guest, OURS, "hv_vss")?;
    let before = main_pid(guest)?;
    guest.sh(&format!(
        "mkdir -p $(dirname {BAD}) && echo 'deadline = x' >{BAD}"
    ))?;
    // To the same version.
    let said = install(guest, "hv-vss-daemon_*.deb")?;
    let says = |words: &str| said.lines().any(|it| it.contains(words));
    ensure!(
        says("goes on with the version of before") && says("line 1, column 12"),
        "what is wrong should be said: {said}"
    );
    equal("who serves", &main_pid(guest)?, &before)?;
    serves(guest, OURS, "hv_vss")?;
    guest.sh(&format!("rm {BAD}"))?;
    let said = install(guest, "hv-vss-daemon_*.deb")?;
    let after = main_pid(guest)?;
    ensure!(after != before, "ours should have been restarted: {said}");
    serves(guest, OURS, "hv_vss")?;
    end(guest)
}

fn installed_amid_a_freeze(guest: &Guest) -> Result<()> {
    install(guest, "dkms_*.deb hyperv-daemons_*.deb")?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, THEIRS, "hv_utils")?;
    // Unpacked before: dpkg would wait for the root that is frozen then.
    guest.sh(&format!(
        "cd {PACKAGES} && dpkg --unpack --force-depends hv-vss-daemon_*.deb"
    ))?;
    guest.writer_start("/var/tmp/writer")?;
    let vss = guest.vss();
    // Its part that stops theirs, by itself.
    let script = "/var/lib/dpkg/info/hv-vss-daemon.postinst";
    let configure = guest.spawn(&[
        "sh",
        "-c",
        &format!(
            "cp {script} /run/postinst && until [ -e /run/frozen ]; do sleep 0.2; done
             DPKG_MAINTSCRIPT_PACKAGE=hv-vss-daemon exec sh -x /run/postinst configure"
        ),
    ])?;
    guest.wait_until("the script is ready", STEP, || {
        Ok(guest.try_sh("test -e /run/postinst")?.status == Some(0))
    })?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.sh("touch /run/frozen")?;
    guest.wait(&configure, STEP * 2)?;
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
    // Without a daemon it would fail in any case.
    guest.wait_until("ours is there", STEP, || {
        Ok(vss.hot_backup(STEP)?.status() == status::OK)
    })?;
    equal("who is stuck", super::stuck_writers(guest)?, Vec::new())?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    guest.writers_stop()?;
    guest.sh("dpkg --configure --force-depends hv-vss-daemon 2>&1")?;
    serves(guest, OURS, "hv_utils")?;
    power_off(guest)
}

fn upgraded_amid_a_freeze(guest: &Guest) -> Result<()> {
    install(guest, "dkms_*.deb hyperv-daemons_*.deb hv-vss-daemon_*.deb")?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, OURS, "hv_utils")?;
    upgraded_before_thaw(guest, "hv_utils")?;
    // The former version once more, and the module.
    install(guest, "hv-vss-daemon_*.deb hv-vss-dkms_*.deb")?;
    serves(guest, OURS, "hv_vss")?;
    upgraded_before_thaw(guest, "hv_vss")?;
    power_off(guest)
}

/// Upgrades our daemon, which serves the device of `module`, while all is frozen: by what the package does after it is
/// unpacked, and by the last step of that alone.
fn upgraded_before_thaw(guest: &Guest, module: &str) -> Result<()> {
    let vss = guest.vss();
    let version = "dpkg-query --show --showformat '${Version}' hv-vss-daemon";
    let old = guest.sh(version)?;
    // Unpacked before, and the script elsewhere: dpkg would wait for the root that is frozen then.
    guest.sh(&format!(
        "cd {PACKAGES}/next && dpkg --unpack --force-depends hv-vss-daemon_*.deb &&
         cp /var/lib/dpkg/info/hv-vss-daemon.postinst /run/postinst"
    ))?;
    let new = guest.sh(version)?;
    ensure!(new != old, "the version should be new: {new}");
    guest.writer_start("/var/tmp/writer")?;

    // Debian's part writes down what is enabled, to the root, before it restarts ours.
    let before = main_pid(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let line =
        format!("DPKG_MAINTSCRIPT_PACKAGE=hv-vss-daemon exec sh /run/postinst configure {old}");
    let configure = guest.spawn(&["sh", "-c", &line])?;
    guest.wait_until("it waits for the root", STEP, || {
        // Its name is cut at 15 characters; D: it waits in the kernel, and not for a signal.
        let waits = "grep -qs '(deb-systemd-hel[^ ]*) D ' /proc/[0-9]*/stat";
        Ok(guest.try_sh(waits)?.status == Some(0))
    })?;
    guest.wait_until("the root stands still", STEP, || stands_still(guest))?;
    equal("who serves meanwhile", &main_pid(guest)?, &before)?;
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    let ended = guest.wait(&configure, STEP)?;
    let said = guest.output(&configure)?;
    ensure!(
        ended.status == Some(0),
        "this should succeed: {line}\n{said}"
    );
    // What is put in place was restarted.
    let after = main_pid(guest)?;
    ensure!(after != before, "ours should have been restarted: {said}");
    guest.writers_stop()?;
    serves(guest, OURS, module)?;

    // A FREEZE that comes between the two finds the restart under way.
    guest.writer_start("/var/tmp/writer")?;
    let restart = guest.spawn(&[
        "sh",
        "-c",
        "until [ -e /run/frozen ]; do sleep 0.2; done; exec deb-systemd-invoke restart hv_vss.service",
    ])?;
    let before = main_pid(guest)?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    guest.wait_until("the root stands still", STEP, || stands_still(guest))?;
    guest.sh("touch /run/frozen")?;
    guest.wait(&restart, STEP * 2)?;
    let after = main_pid(guest)?;
    ensure!(after != before, "ours should have been restarted");
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
    // Without a daemon it would fail in any case.
    guest.wait_until("ours is there", STEP, || {
        Ok(vss.hot_backup(STEP)?.status() == status::OK)
    })?;
    equal("who is stuck", super::stuck_writers(guest)?, Vec::new())?;
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    guest.writers_stop()?;
    guest.sh("rm /run/frozen && dpkg --configure --force-depends hv-vss-daemon 2>&1")?;
    serves(guest, OURS, module)
}

/// The process that serves as ours.
fn main_pid(guest: &Guest) -> Result<String> {
    guest.sh(&format!("systemctl show --property=MainPID --value {OURS}"))
}

fn removed_amid_a_freeze(guest: &Guest) -> Result<()> {
    install(guest, "dkms_*.deb hyperv-daemons_*.deb hv-vss-daemon_*.deb")?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, OURS, "hv_utils")?;

    // A host that thaws too late.
    let drop_in = "/etc/hv_vss/daemon.toml.d/test.toml";
    guest.sh(&format!(
        "echo deadline = 4 >{drop_in} && systemctl reload {OURS}"
    ))?;
    removed_before_thaw(guest, "hv-vss-daemon")?;
    // Where the device changes hands, too.
    install(guest, "hv-vss-daemon_*.deb hv-vss-dkms_*.deb")?;
    serves(guest, OURS, "hv_vss")?;
    removed_before_thaw(guest, "hv-vss-dkms hv-vss-daemon")?;

    // One that thaws in time. dpkg would wait for the root that is frozen, so these are the parts that end
    // the service, by themselves.
    guest.sh(&format!("rm {drop_in}"))?;
    install(guest, "hv-vss-daemon_*.deb hv-vss-dkms_*.deb")?;
    serves(guest, OURS, "hv_vss")?;
    waits_for_the_backup(guest, "exec /usr/libexec/hv_vss_hand_over give")?;
    serves(guest, OURS, "hv_utils")?;
    guest.sh("cp /var/lib/dpkg/info/hv-vss-daemon.prerm /run/prerm")?;
    let stop = "DPKG_MAINTSCRIPT_PACKAGE=hv-vss-daemon exec sh /run/prerm remove";
    waits_for_the_backup(guest, stop)?;
    let active = format!("systemctl --quiet is-active {OURS}");
    let status = guest.try_sh(&active)?.status;
    ensure!(
        status.is_some_and(|it| it != 0),
        "ours should be stopped: {status:?}"
    );
    power_off(guest)
}

/// Runs `line` while all is frozen, and sees that it lets the backup come to a good end.
fn waits_for_the_backup(guest: &Guest, line: &str) -> Result<()> {
    let vss = guest.vss();
    guest.writer_start("/var/tmp/writer")?;
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let work = guest.spawn(&["sh", "-c", line])?;
    guest.wait_until("it waits for the end of the backup", STEP, || {
        Ok(guest.output(&work)?.contains("waiting for its end"))
    })?;
    ensure!(stands_still(guest)?, "the root should stand still: {line}");
    answered("THAW", &vss.thaw(STEP)?, status::OK)?;
    let ended = guest.wait(&work, STEP)?;
    let said = guest.output(&work)?;
    ensure!(
        ended.status == Some(0),
        "this should succeed: {line}\n{said}"
    );
    guest.writers_stop()?;
    Ok(())
}

/// Removes these during a freeze that its deadline ends, and sees that no THAW is good.
fn removed_before_thaw(guest: &Guest, packages: &str) -> Result<()> {
    let vss = guest.vss();
    answered("FREEZE", &vss.freeze(&[], STEP)?, status::OK)?;
    let line = format!("dpkg --remove {packages}");
    let work = guest.spawn(&["sh", "-c", &line])?;
    let ended = guest.wait(&work, STEP * 2)?;
    let said = guest.output(&work)?;
    ensure!(
        ended.status == Some(0),
        "this should succeed: {line}\n{said}"
    );
    theirs_is_to_come(guest)?;
    vss.wait_open(STEP)?;
    vss.agree(STEP)?;
    if guest
        .try_sh(&format!("systemctl --quiet is-active {THEIRS}"))?
        .status
        == Some(0)
    {
        // Until it serves, THAW would fail in any case.
        guest.wait_until("theirs is there", STEP, || {
            Ok(vss.hot_backup(STEP)?.status() == status::OK)
        })?;
    }
    answered("THAW", &vss.thaw(STEP)?, status::FAIL)?;
    not_so_late(guest)?;
    serves(guest, THEIRS, "hv_utils")?;
    let left = guest.sh("ls -d /run/hv[_-]vss* 2>/dev/null || true")?;
    equal("what is left in /run", left.trim(), "")
}

fn blacklisted(guest: &Guest) -> Result<()> {
    // The case before has left no module loaded. A soft dependency loads what is blacklisted; without that
    // it is up to the hand-over alone.
    guest
        .sh("insmod $(modinfo -n hv_utils) && echo blacklist hv_vss >/etc/modprobe.d/test.conf")?;
    guest.vss().wait_open(STEP)?;
    cold_plug(guest)?;
    serves(guest, OURS, "hv_utils")?;
    journal_says(guest, "hv_vss is blacklisted")?;
    check_warns(guest, "hv_vss is built and hv_utils serves")?;
    guest.sh("rm /etc/modprobe.d/test.conf")?;
    end(guest)
}

fn mainline_daemon(guest: &Guest) -> Result<()> {
    // The case before has left no module loaded.
    cold_plug(guest)?;
    serves(guest, OURS, "hv_vss")?;
    guest.sh(&format!("systemctl stop {OURS}"))?;
    let daemon = guest.spawn(&[&format!("{PACKAGES}/hv_vss_daemon"), "-n"])?;
    super::wait_for_daemon(guest)?;
    let state = super::ModuleState::of(guest)?;
    equal("its protocol", state.words("daemon_abi")?, vec!["1"])?;
    guest.writer_start("/var/tmp/writer")?;
    let seen = super::observe(guest);
    guest.writers_stop()?;
    equal(
        "a backup by Linux's own daemon",
        seen?,
        super::good(&["/var/tmp/writer"]),
    )?;
    guest.signal(&daemon, 15)?;
    guest.wait(&daemon, STEP)?;
    end(guest)
}

fn unknown_key(guest: &Guest) -> Result<()> {
    serves(guest, OURS, "hv_utils")?;
    rest_is_stock(guest)?;
    journal_says(guest, "Secure Boot: the kernel does not know the key")?;
    end(guest)
}

fn secure_boot(guest: &Guest) -> Result<()> {
    is_locked_down(guest)?;
    install(guest, "dkms_*.deb hv-vss-daemon_*.deb hv-vss-dkms_*.deb")?;
    guest.sh("modprobe hv_utils")?;
    serves(guest, OURS, "hv_utils")?;
    rest_is_stock(guest)?;
    journal_says(guest, "Secure Boot: the kernel does not know the key")?;
    check_warns(
        guest,
        "the kernel does not know the key that it is signed with (Secure Boot), that of DKMS",
    )?;

    let guest = &reboot_as(guest, Machine::SECURE_BOOT_WITH_KEY)?;
    is_locked_down(guest)?;
    serves(guest, OURS, "hv_vss")?;
    rest_is_stock(guest)?;

    // As where there is nothing to sign with. What is signed ends with the signature, 12 bytes of which the last four are
    // its length, and a line.
    let unsign = "module=$(modinfo -n hv_vss) && plain=${module%.ko*}.ko && cd /run &&
        case $module in *.xz) xz -dc $module ;; *) cat $module ;; esac >signed.ko &&
        length=$(tail -c 32 signed.ko | head -c 4 | od -An -t u4 --endian=big) &&
        head -c -$((length + 12 + 28)) signed.ko >plain.ko &&
        rm $module && mv plain.ko $plain && depmod";
    guest.sh(unsign)?;
    let guest = &reboot_as(guest, Machine::SECURE_BOOT_WITH_KEY)?;
    serves(guest, OURS, "hv_utils")?;
    journal_says(guest, "Secure Boot: it is not signed")?;
    check_warns(
        guest,
        "it is not signed, and the kernel takes no such module (Secure Boot)",
    )?;
    // What is to be done about it needs no archive of packages, and speaks of what DKMS has here.
    let known = guest.sh("dkms status -m hv_vss -k $(uname -r)")?;
    let mut words = known.split(", ");
    let (module, release) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let line = |verb: &str| format!("dkms {verb} --force {module} -k {release}");
    let again = format!("{} && {}", line("build"), line("install"));
    journal_says(guest, &again)?;
    check_warns(guest, &again)?;
    guest.close()
}

/// The kernel has found that Secure Boot is enforced.
fn is_locked_down(guest: &Guest) -> Result<()> {
    guest.sh(
        "mountpoint -q /sys/kernel/security || mount -t securityfs none /sys/kernel/security",
    )?;
    equal(
        "the lockdown",
        guest.read("/sys/kernel/security/lockdown")?.trim(),
        "none [integrity] confidentiality",
    )
}
