// SPDX-License-Identifier: GPL-2.0-only

//! Databases: the servers of MariaDB and PostgreSQL as Debian has them, under load, with the hooks that
//! this project ships for them and without.
//!
//! A copy of the disk with the data is good when the server starts from it and has every row whose
//! commit was acknowledged before the answer to FREEZE, none whose commit was begun after it, and finds
//! its tables in order. Sessions keep notes of their rows as the writers of `restore/*` do of their records.
//! Nothing may leave a server locked, whoever dies and whenever.

use super::disks::{case, load_driver, Attached};
use super::hooks::OWED;
use super::restore::{Expected, NOTES};
use super::{good, load, observe, rounds, seed, start, stop, wait_for_daemon, Case, When};
use anyhow::{bail, ensure, Context, Result};
use e2e::check::{answered, equal};
use e2e::guest::{Daemon, Guest, Machine, Module, Process, STEP};
use hyperv_sim::ic::status;
use hyperv_sim::storage::Image;
use std::time::Duration;

pub const CASES: &[Case] = &[
    of_databases(
        "databases/mariadb",
        "a backup under load with the hook restores: all rows, and no table is to be repaired",
        mariadb,
    )
    .comparing(),
    of_databases(
        "databases/postgresql",
        "a backup under load with the hook restores: all rows, and recovery is short",
        |guest| with_hook(guest, Server::PostgreSql).map(drop),
    ),
    of_databases(
        "databases/guest-agent-hook",
        "the hook of the QEMU guest agent as Debian packages it: what it dispatches to is called once for each, and \
         with nothing to dispatch to it is called itself",
        guest_agent_hook,
    ),
    of_databases(
        "databases/mariadb-without-hook",
        "without the hook all rows of InnoDB restore, and a table without transactions is to be repaired",
        |guest| without_hook(guest, Server::MariaDb),
    )
    .comparing(),
    of_databases(
        "databases/postgresql-without-hook",
        "without the hook all rows restore, after a longer recovery",
        |guest| without_hook(guest, Server::PostgreSql),
    )
    .comparing(),
    of_databases(
        "databases/mariadb-killed",
        "kill -9 of the daemon, or of a part of the hook's session, at random moments: commits go on at once",
        |guest| killed(guest, Server::MariaDb),
    ),
    of_databases(
        "databases/postgresql-killed",
        "the same with PostgreSQL",
        |guest| killed(guest, Server::PostgreSql),
    ),
    of_databases(
        "databases/mariadb-never-thawed",
        "a daemon that dies for good leaves the server locked for the hook's own limit, also if all of that hangs",
        never_thawed,
    ),
    of_databases(
        "databases/mariadb-long-statement",
        "a statement that locks a table fails the backup within the hook's limit, and a long query does not",
        long_statement,
    ),
];

const fn of_databases(
    name: &'static str,
    about: &'static str,
    run: fn(&Guest) -> Result<()>,
) -> Case {
    Case {
        machine: Machine::DATABASES,
        // A server is slow to start in an emulated machine.
        per_round: Duration::from_secs(60),
        // `make test-databases`: what they need takes a while to make.
        when: When::Named,
        ..case(name, about, run)
    }
}

/// Where the hooks are installed, and where the daemon looks for them.
const SHIPPED: &str = "/payload/install/usr/share/hv_vss/hooks";
const FOLDER: &str = "/etc/hv_vss/hooks.d";

/// Where the disk with the data is mounted.
const MOUNT: &str = "/mnt/db";

/// How long a session may wait for a commit when nothing is frozen or locked any more. The hook's own
/// limit, after which it lets go by itself, is far above.
const SOON: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    MariaDb,
    PostgreSql,
}

/// A session of the load: which rows it commits.
struct Session {
    /// Its table.
    table: &'static str,
    /// Whether the table has transactions: without them it takes a hook to keep it in order.
    is_safe: bool,
}

impl Server {
    /// The hook, and the fresh data folder in `/srv`.
    fn name(self) -> &'static str {
        match self {
            Server::MariaDb => "mariadb",
            Server::PostgreSql => "postgresql",
        }
    }

    fn format(self) -> &'static str {
        match self {
            Server::MariaDb => "ext4",
            Server::PostgreSql => "xfs",
        }
    }

    /// MiB of its disk. The least that mkfs.xfs takes is 300.
    fn size(self) -> u64 {
        match self {
            Server::MariaDb => 192,
            Server::PostgreSql => 320,
        }
    }

    /// What runs it in the foreground on the mounted disk. MariaDB is not to repair a table by itself, nor to
    /// make itself a key at each start, which takes a minute here.
    fn command(self) -> &'static str {
        match self {
            Server::MariaDb => {
                // The hook's client reads what an administrator has for his.
                "printf '[client]\\nskip-ssl\\n' >/root/.my.cnf
                 mkdir -p /run/mysqld && chown mysql: /run/mysqld
                 exec mariadbd --no-defaults --user=mysql --datadir=/mnt/db/data --skip-networking --skip-ssl \
                     --log-bin=binlog --server-id=1 --myisam-recover-options=OFF --innodb-buffer-pool-size=32M \
                     --innodb-log-file-size=4M --innodb-data-file-path=ibdata1:4M:autoextend \
                     --innodb-autoextend-increment=1"
            }
            Server::PostgreSql => {
                "mkdir -p /run/postgresql /dev/shm && chown postgres: /run/postgresql && chmod 1777 /dev/shm
                 exec setpriv --reuid=postgres --regid=postgres --clear-groups \
                     /usr/lib/postgresql/17/bin/postgres -D /mnt/db/data -k /run/postgresql \
                     -c listen_addresses= -c shared_buffers=16MB"
            }
        }
    }

    /// Its client, which does what it is given and writes bare results.
    fn client(self) -> &'static [&'static str] {
        match self {
            Server::MariaDb => &[
                "mariadb",
                "--no-defaults",
                "--skip-ssl",
                "--batch",
                "--skip-column-names",
                "--unbuffered",
            ],
            Server::PostgreSql => &[
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                "psql",
                "--no-psqlrc",
                "--quiet",
                "--no-align",
                "--tuples-only",
                "--set=ON_ERROR_STOP=1",
            ],
        }
    }

    /// One session for each: its number is its place.
    fn sessions(self) -> &'static [Session] {
        match self {
            Server::MariaDb => &[
                Session {
                    table: "rows_0",
                    is_safe: true,
                },
                Session {
                    table: "rows_1",
                    is_safe: true,
                },
                // Of MyISAM, which has no transactions.
                Session {
                    table: "rows_2",
                    is_safe: false,
                },
            ],
            Server::PostgreSql => &[
                Session {
                    table: "rows_0",
                    is_safe: true,
                },
                Session {
                    table: "rows_1",
                    is_safe: true,
                },
            ],
        }
    }

    /// Makes the tables of the sessions, and selects them.
    fn make_tables(self) -> &'static str {
        match self {
            Server::MariaDb => {
                "CREATE DATABASE lab; USE lab;
                 CREATE TABLE rows_0 (number BIGINT PRIMARY KEY, filler TEXT) ENGINE=InnoDB;
                 CREATE TABLE rows_1 LIKE rows_0;
                 CREATE TABLE rows_2 (number BIGINT PRIMARY KEY, filler TEXT) ENGINE=MyISAM;"
            }
            Server::PostgreSql => {
                "CREATE EXTENSION amcheck; CREATE SCHEMA lab;
                 CREATE TABLE lab.rows_0 (number BIGINT PRIMARY KEY, filler TEXT);
                 CREATE TABLE lab.rows_1 (number BIGINT PRIMARY KEY, filler TEXT);"
            }
        }
    }

    /// Prints what is wrong with a table, by its own means; nothing if all is in order.
    fn check(self, guest: &Guest, table: &str) -> Result<Option<String>> {
        let complaint = match self {
            Server::MariaDb => {
                let told = self.sql(guest, &format!("CHECK TABLE lab.{table} EXTENDED"))?;
                let lines = told.lines().filter(|it| !it.ends_with("\tstatus\tOK"));
                lines.collect::<Vec<_>>().join("\n")
            }
            Server::PostgreSql => self.sql(
                guest,
                &format!(
                    "SELECT * FROM verify_heapam('lab.{table}');
                     SELECT 'no index' WHERE bt_index_parent_check('lab.{table}_pkey', true, true) IS NULL"
                ),
            )?,
        };
        let complaint = complaint.trim();
        Ok(Some(complaint.to_owned()).filter(|it| !it.is_empty()))
    }

    /// What the server answers.
    fn sql(self, guest: &Guest, statements: &str) -> Result<String> {
        let client = self.client().join(" ");
        guest.sh(&format!("{client} <<'END'\n{statements};\nEND"))
    }

    /// Starts it from what is on the mounted disk and waits until it serves.
    fn start(self, guest: &Guest) -> Result<Process> {
        let process = guest.spawn(&["sh", "-c", self.command()])?;
        // A client that asks again and again would slow it down.
        let ready = match self {
            Server::MariaDb => "ready for connections",
            Server::PostgreSql => "ready to accept connections",
        };
        guest.wait_until(&format!("{self:?} serves"), STEP * 4, || {
            let said = guest.output(&process)?;
            ensure!(!guest.has_ended(&process)?, "{self:?} has ended: {said}");
            Ok(said.contains(ready))
        })?;
        Ok(process)
    }
}

/// A server under load.
struct Rig {
    server: Server,
    data: Attached,
    notes: Attached,
    process: Process,
}

impl Rig {
    fn new(guest: &Guest, server: Server) -> Result<Rig> {
        let notes = Attached::new(guest, NOTES.0, NOTES.1, 1, Image::default())?;
        let data = Attached::new(guest, 0, 0, server.size(), Image::default())?;
        load_driver(guest)?;
        let (node, format, name) = (data.node(guest)?, server.format(), server.name());
        guest.sh(&format!(
            "modprobe xfs; mkdir -p {MOUNT}
             mkfs.{format} -q {node} && mount {node} {MOUNT} && cp -a /srv/{name} {MOUNT}/data && sync"
        ))?;
        let process = server.start(guest)?;
        server.sql(guest, server.make_tables())?;
        let rig = Rig {
            server,
            data,
            notes,
            process,
        };
        rig.start_sessions(guest)?;
        Ok(rig)
    }

    /// Lets sessions loose on it.
    fn start_sessions(&self, guest: &Guest) -> Result<()> {
        let notes = self.notes.node(guest)?;
        for (slot, session) in (0..).zip(self.server.sessions()) {
            let table = session.table;
            let statement =
                format!("INSERT INTO lab.{table} VALUES ({{}}, repeat('x', 200)); SELECT {{}};");
            guest.committer_start(self.server.client(), &statement, &notes, slot, 5_000)?;
        }
        self.go_on(guest, "sessions commit", 10, STEP * 2)
    }

    /// Waits until each session has committed so many more rows.
    fn go_on(&self, guest: &Guest, what: &str, rows: u64, limit: Duration) -> Result<()> {
        let start = guest.writers()?;
        let mut now = start.clone();
        let in_time = guest.wait_until(what, limit, || {
            now = guest.writers()?;
            let mut both = start.iter().zip(&now);
            Ok(both.all(|(then, now)| now.count >= then.count + rows))
        });
        in_time.with_context(|| format!("the sessions: {now:?}"))
    }

    /// A backup, copied before it, between the answer and THAW, and after it.
    fn back_up(&self, guest: &Guest) -> Result<Backup> {
        let (host, disk) = (guest.host(), &self.data.disk);
        self.notes.disk.start_log().context("no log")?;
        self.go_on(guest, "before the backup", 5, STEP)?;
        let early = disk.snapshot().context("no copy")?;
        self.go_on(guest, "before FREEZE", 2, STEP)?;
        let redo = match self.server {
            Server::MariaDb => None,
            Server::PostgreSql => Some(self.server.sql(guest, "SELECT pg_current_wal_lsn()")?),
        };

        let freeze = guest.vss().freeze(&[self.data.in_backup()], STEP * 2)?;
        let copy = disk.snapshot().context("no copy")?;
        answered("FREEZE", &freeze, status::OK)?;
        // A real host takes its time, too.
        std::thread::sleep(Duration::from_millis(300));
        answered("THAW", &guest.vss().thaw(STEP)?, status::OK)?;

        self.go_on(guest, "after THAW", 2, SOON)?;
        // A table without transactions is written some time later, and this copy is to have all of them.
        guest.sh("sync")?;
        let late = disk.snapshot().context("no copy")?;
        let notes = self.notes.disk.log();
        self.notes.disk.stop_log();
        let slots = 0..self.server.sessions().len() as u64;
        let expected = slots
            .map(|slot| Expected::at(&notes, slot, |moment| host.time_of(moment) < freeze.at))
            .collect();
        Ok(Backup {
            early,
            copy,
            late,
            expected,
            redo,
        })
    }

    /// Ends load and server as a loss of power would, and takes the disk away.
    fn stop(self, guest: &Guest) -> Result<()> {
        guest.writers_stop()?;
        end_server(guest, self.server, &self.process)?;
        self.data.detach(guest)?;
        self.notes.detach(guest)
    }
}

/// Kills a server and unmounts its disk.
fn end_server(guest: &Guest, server: Server, process: &Process) -> Result<()> {
    guest.signal(process, 9)?;
    guest.wait(process, STEP)?;
    // The processes of PostgreSQL end by themselves when the first has.
    guest.wait_until(&format!("{server:?} is gone"), STEP, || {
        Ok(guest.try_sh(&format!("umount {MOUNT}"))?.status == Some(0))
    })
}

/// What a backup brought.
struct Backup {
    early: Image,
    copy: Image,
    late: Image,
    /// Of each session.
    expected: Vec<Expected>,
    /// How far the write-ahead log was before FREEZE, of PostgreSQL.
    redo: Option<String>,
}

/// What is wrong with what a server makes of a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Verdict {
    /// Rows that should or should not be there.
    rows: Vec<String>,
    /// Tables that are not in order.
    tables: Vec<String>,
    /// Why recovery was longer than a hook makes it.
    recovery: Option<String>,
}

impl Verdict {
    /// In words, for the comparison.
    fn describe(&self) -> String {
        let mut faults = Vec::new();
        if !self.rows.is_empty() {
            faults.push("rows are lost");
        }
        if !self.tables.is_empty() {
            faults.push("a table is to be repaired");
        }
        if self.recovery.is_some() {
            faults.push("recovery is longer");
        }
        match faults.as_slice() {
            [] => "restores: all rows, all tables in order, recovery is short".into(),
            faults => format!("restores, but {}", faults.join(", ")),
        }
    }
}

/// Starts the server from a copy, offered as a further disk, and judges what it has.
fn judge(guest: &Guest, server: Server, backup: &Backup, image: &Image) -> Result<Verdict> {
    let disk = Attached::new(guest, 1, 0, server.size(), image.clone())?;
    let node = disk.node(guest)?;
    guest.sh(&format!("mount {node} {MOUNT}"))?;
    let mut verdict = Verdict::default();
    if let Some(redo) = &backup.redo {
        let from = guest.sh(&format!(
            "/usr/lib/postgresql/17/bin/pg_controldata {MOUNT}/data | sed -n \"s/^Latest checkpoint's REDO location: *//p\""
        ))?;
        if lsn(&from)? < lsn(redo)? {
            let (from, redo) = (from.trim(), redo.trim());
            verdict.recovery = Some(format!("it starts at {from}, before {redo}"));
        }
    }
    let process = server.start(guest)?;
    for (session, expected) in server.sessions().iter().zip(&backup.expected) {
        let table = session.table;
        // Before rows are read: MariaDB does not read a table that is not in order.
        if let Some(complaint) = server.check(guest, table)? {
            verdict.tables.push(format!("{table}: {complaint}"));
        }
        let counted = "SELECT count(*), coalesce(min(number), 1), coalesce(max(number), 0), \
                       coalesce(sum(number), 0), coalesce(sum(length(filler)), 0)";
        let told = match server.sql(guest, &format!("{counted} FROM lab.{table}")) {
            Ok(told) => told,
            Err(error) => {
                verdict.rows.push(format!("{table}: {error}"));
                continue;
            }
        };
        let numbers: Result<Vec<u64>, _> = told.trim().split(['\t', '|']).map(str::parse).collect();
        if let Some(fault) = judge_rows(&numbers.context(told)?, *expected)? {
            verdict.rows.push(format!("{table}: {fault}"));
        }
    }
    end_server(guest, server, &process)?;
    disk.detach(guest)?;
    Ok(verdict)
}

/// A place in the write-ahead log of PostgreSQL.
fn lsn(text: &str) -> Result<u64> {
    let (high, low) = text.trim().split_once('/').context("no place in the log")?;
    Ok(u64::from_str_radix(high, 16)? << 32 | u64::from_str_radix(low, 16)?)
}

/// What is wrong with the rows of a table, by how many there are, the first and the last number, and the
/// sums of the numbers and of the lengths: they must be those from 1 on, each whole.
fn judge_rows(numbers: &[u64], expected: Expected) -> Result<Option<String>> {
    let &[count, first, last, sum, length] = numbers else {
        bail!("five numbers were asked for: {numbers:?}");
    };
    let Expected { least, most } = expected;
    Ok(if count < least {
        Some(format!("{least} were committed, {count} are there"))
    } else if count > most {
        Some(format!("{most} were begun, {count} are there"))
    } else if (first, last, sum, length) != (1, count, count * (count + 1) / 2, count * 200) {
        Some(format!("of {count} rows some are others: {numbers:?}"))
    } else {
        None
    })
}

/// Puts the hook of `server` in place, as an administrator does.
fn install_hook(guest: &Guest, server: Server) -> Result<()> {
    let name = server.name();
    let line = format!("mkdir -p {FOLDER} && ln -s {SHIPPED}/{name} {FOLDER}/50-{name}");
    guest.sh(&line).map(drop)
}

fn remove_hooks(guest: &Guest) -> Result<()> {
    guest.sh("rm -rf /etc/hv_vss").map(drop)
}

/// Waits until whatever was called is let go.
fn let_go(guest: &Guest) -> Result<()> {
    guest.wait_until("all hooks are let go", STEP, || {
        let left = guest.try_sh(&format!(
            "test ! -e {OWED} -a ! -e /run/hv_vss_hooks/mariadb"
        ))?;
        Ok(left.status == Some(0))
    })
}

/// One backup under load with this module and daemon.
fn one_backup(guest: &Guest, server: Server, module: Module, daemon: Daemon) -> Result<Backup> {
    let process = start(guest, module, daemon)?;
    let rig = Rig::new(guest, server)?;
    let backup = rig.back_up(guest)?;
    let_go(guest)?;
    rig.stop(guest)?;
    stop(guest, module, &process)?;
    Ok(backup)
}

fn mariadb(guest: &Guest) -> Result<()> {
    let ours = with_hook(guest, Server::MariaDb)?;
    // In place for this one, too, which knows none.
    install_hook(guest, Server::MariaDb)?;
    let backup = one_backup(guest, Server::MariaDb, Module::Stock, Daemon::Debian)?;
    remove_hooks(guest)?;
    let peer = judge(guest, Server::MariaDb, &backup, &backup.copy)?;
    println!("     the peer: {:?}, {peer:?}", backup.expected);
    guest.compare(
        "MariaDB under load, with the hook that ours has for it in place",
        &ours.describe(),
        &peer.describe(),
    );
    Ok(())
}

/// A backup by ours with the hook, which must be good. Returns what its copy is worth.
fn with_hook(guest: &Guest, server: Server) -> Result<Verdict> {
    install_hook(guest, server)?;
    let backup = one_backup(guest, server, Module::Ours, Daemon::Ours)?;
    remove_hooks(guest)?;
    let verdict = judge(guest, server, &backup, &backup.copy)?;
    println!("     {:?}: {verdict:?}", backup.expected);
    ensure!(
        backup.expected.iter().all(|it| it.least > 0),
        "there should have been rows: {:?}",
        backup.expected
    );
    equal("what is wrong with the copy", &verdict, &Verdict::default())?;
    // The judges are awake: copies of other moments have other rows.
    for (what, image) in [("too early", &backup.early), ("too late", &backup.late)] {
        let other = judge(guest, server, &backup, image)?;
        println!("     a copy {what}: {:?}", other.rows);
        equal(
            &format!("sessions with other rows in a copy {what}"),
            other.rows.len(),
            server.sessions().len(),
        )?;
    }
    Ok(verdict)
}

/// How far a crash-consistent copy gets, which has no hook.
fn without_hook(guest: &Guest, server: Server) -> Result<()> {
    let mut told = Vec::new();
    for (module, daemon) in [
        (Module::Ours, Daemon::Ours),
        (Module::Stock, Daemon::Debian),
    ] {
        let backup = one_backup(guest, server, module, daemon)?;
        let verdict = judge(guest, server, &backup, &backup.copy)?;
        println!("     {module:?}: {:?}, {verdict:?}", backup.expected);
        let unsafe_tables: Vec<_> = server
            .sessions()
            .iter()
            .filter(|it| !it.is_safe)
            .map(|it| it.table)
            .collect();
        let is_known = |it: &String| unsafe_tables.iter().any(|table| it.starts_with(table));
        ensure!(
            verdict.rows.iter().all(is_known) && verdict.tables.iter().all(is_known),
            "{module:?}: the copy is bad: {verdict:#?}"
        );
        // What the hook is for, and the judges of `with_hook` see it.
        ensure!(
            verdict.tables.len() == unsafe_tables.len()
                && verdict.recovery.is_some() == backup.redo.is_some(),
            "{module:?}: without a hook this should be worse: {verdict:?}"
        );
        told.push(verdict.describe());
    }
    if let [ours, peer] = told.as_slice() {
        let name = match server {
            Server::MariaDb => "MariaDB",
            Server::PostgreSql => "PostgreSQL",
        };
        let what = format!("{name} under load, no hook");
        guest.compare(&what, ours, peer);
    }
    Ok(())
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Daemon,
    /// The client that has the session.
    Client,
    /// What holds the client's input.
    Holder,
    /// All that the hook has started.
    Group,
}

/// Prints the process of the client with the hook's session.
const CLIENT: &str = "for pid in $(pidof mariadb); do
                          case \" $(pidof timeout) \" in
                          *\" $(cut -d ' ' -f 4 /proc/$pid/stat) \"*) echo $pid ;;
                          esac
                      done";

impl Victim {
    const ALL: [Victim; 6] = [
        Victim::Daemon,
        Victim::Client,
        Victim::Daemon,
        Victim::Holder,
        Victim::Daemon,
        Victim::Group,
    ];

    /// Kills it, if it is there; whether it was.
    fn strike(self, guest: &Guest) -> Result<bool> {
        let line = match self {
            Victim::Daemon => "kill -9 $(pidof hv_vss_daemon)",
            Victim::Client => &format!("kill -9 $({CLIENT})"),
            Victim::Holder => "kill -9 $(pidof timeout)",
            Victim::Group => "kill -9 -$(cut -d ' ' -f 5 /proc/$(pidof timeout)/stat)",
        };
        Ok(guest.try_sh(line)?.status == Some(0))
    }
}

/// How many rounds are not left to chance: death comes while all is frozen.
const WHILE_FROZEN: u32 = 4;

fn killed(guest: &Guest, server: Server) -> Result<()> {
    install_hook(guest, server)?;
    super::load(guest, Module::Ours, &["grace_ms=300"])?;
    let mut daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    let rig = Rig::new(guest, server)?;
    let span = super::good_backup(guest)?;
    let_go(guest)?;
    let mut random = fastrand::Rng::with_seed(seed());
    let mut struck = 0;
    for (round, victim) in (1..=rounds()).zip(Victim::ALL.iter().cycle()) {
        let victim = match server {
            Server::MariaDb => *victim,
            // Its hook holds nothing.
            Server::PostgreSql => Victim::Daemon,
        };
        let frozen = round <= WHILE_FROZEN;
        let delay = span.mul_f64(random.f64() * 1.5);
        let what = match frozen {
            true => format!("round {round}, {victim:?} killed while all was frozen"),
            false => format!("round {round}, {victim:?} killed {delay:?} after FREEZE was sent"),
        };
        let freeze = guest.vss().send_freeze(&[])?;
        let answer = || {
            let reply = super::reply_within(guest, freeze, STEP * 2)?;
            let reply = reply.with_context(|| format!("{what}: no answer to FREEZE"))?;
            anyhow::Ok(reply.status())
        };
        let mut told = None;
        if frozen {
            told = Some(answer()?);
            equal("the answer to FREEZE", told, Some(status::OK))?;
        } else {
            std::thread::sleep(delay);
        }
        let hit = victim.strike(guest)?;
        ensure!(hit || !frozen, "{what}: it was not there");
        struck += u32::from(hit);
        if victim == Victim::Daemon {
            guest.wait(&daemon, STEP)?;
            // As the unit does: its stop step in every other round, its next start in any.
            if round % 2 == 0 {
                guest.sh("/payload/hv_vss_daemon thaw")?;
            }
            daemon = guest.start_daemon(Daemon::Ours)?;
            rig.go_on(guest, &what, 1, SOON)?;
            wait_for_daemon(guest)?;
        }
        let told = told.map_or_else(answer, Ok)?;
        if told == status::OK {
            let thaw = guest.vss().thaw(STEP)?.status();
            let expected = match victim {
                Victim::Daemon => status::FAIL,
                _ => status::OK,
            };
            equal(&format!("{what}: the answer to THAW"), thaw, expected)?;
        }
        if frozen && victim != Victim::Daemon {
            // The copy has what was locked until then, and nobody has to find that out by himself.
            guest.wait_until(&format!("{what}: status has a warning"), STEP, || {
                let status = guest.try_sh("/payload/hv_vss_daemon status")?;
                Ok(status.out.contains("hook 50-mariadb"))
            })?;
        }
        rig.go_on(guest, &what, 1, SOON)?;
        let_go(guest).with_context(|| what.clone())?;
    }
    println!("     {} deaths in {} rounds", struck, rounds());
    super::backup(guest)?;
    rig.go_on(guest, "after a good backup", 1, SOON)?;
    let_go(guest)?;
    remove_hooks(guest)?;
    rig.stop(guest)?;
    stop(guest, Module::Ours, &daemon)
}

fn never_thawed(guest: &Guest) -> Result<()> {
    // With a shorter limit than the one that it is shipped with.
    guest.sh(&format!(
        "mkdir -p {FOLDER} && sed 's/^HOLD=.*/HOLD=30/' {SHIPPED}/mariadb >{FOLDER}/50-mariadb
         chmod 755 {FOLDER}/50-mariadb && grep -q '^HOLD=30$' {FOLDER}/50-mariadb"
    ))?;
    super::load(guest, Module::Ours, &["grace_ms=300"])?;
    let mut daemon = guest.start_daemon(Daemon::Ours)?;
    wait_for_daemon(guest)?;
    let rig = Rig::new(guest, Server::MariaDb)?;
    for hangs in [false, true] {
        answered("FREEZE", &guest.vss().freeze(&[], STEP * 2)?, status::OK)?;
        guest.signal(&daemon, 9)?;
        guest.wait(&daemon, STEP)?;
        // Not before: the kernel hangs up on what is stopped when its process group loses its parent.
        if hangs {
            guest.sh(&format!("kill -STOP $(pidof timeout) $({CLIENT})"))?;
        }
        let thawed = guest.clock()?;
        // All is thawed, and the server is still locked.
        guest.wait_until("the sessions wait for the server", STEP, || {
            let waited = guest.clock()? - thawed;
            let all = guest.writers()?;
            Ok(waited > 2_000_000 && all.iter().all(|it| it.in_write_us > waited))
        })?;
        rig.go_on(guest, "the hook has let go by itself", 1, STEP * 2)?;
        if hangs {
            guest.sh(&format!("kill -CONT $(pidof timeout) $({CLIENT})"))?;
        }
        daemon = guest.start_daemon(Daemon::Ours)?;
        wait_for_daemon(guest)?;
        let_go(guest)?;
        // The daemon before has left that THAW to it.
        answered("THAW", &guest.vss().thaw(STEP)?, status::FAIL)?;
    }
    let words = "the session had ended before";
    guest.wait_until(
        "the log says that it was not locked until the thaw",
        STEP,
        || Ok(guest.output(&daemon)?.contains(words)),
    )?;
    remove_hooks(guest)?;
    rig.stop(guest)?;
    stop(guest, Module::Ours, &daemon)
}

fn long_statement(guest: &Guest) -> Result<()> {
    let server = Server::MariaDb;
    install_hook(guest, server)?;
    let daemon = start(guest, Module::Ours, Daemon::Ours)?;
    let rig = Rig::new(guest, server)?;
    // It reads, for as long as nobody ends it.
    let client = server.client().join(" ");
    let query = |text: &str| guest.spawn(&["sh", "-c", &format!("exec {client} -e '{text}'")]);
    let runs = |text: &str| {
        let running = format!(
            "SELECT COUNT(*) FROM information_schema.processlist WHERE info LIKE '{text}%'"
        );
        guest.wait_until(
            text,
            STEP,
            || Ok(server.sql(guest, &running)?.trim() == "1"),
        )
    };
    let read = query("SELECT SLEEP(3600), number FROM lab.rows_0 LIMIT 1")?;
    runs("SELECT SLEEP(3600)")?;
    super::backup(guest)?;
    runs("SELECT SLEEP(3600)")?;
    rig.go_on(guest, "beside a long query", 1, SOON)?;
    let_go(guest)?;
    // It writes to a table without transactions.
    let write = query("INSERT INTO lab.rows_2 SELECT 0 - SLEEP(3600), 0")?;
    runs("INSERT INTO lab.rows_2 SELECT")?;
    let freeze = guest.vss().freeze(&[], STEP * 2)?;
    answered("FREEZE", &freeze, status::FAIL)?;
    guest.wait_until("the log says why", STEP, || {
        let said = guest.output(&daemon)?;
        Ok(said.contains("Lock wait timeout exceeded")
            && said.contains("FREEZE fails: hook 50-mariadb: it failed with exit status 1"))
    })?;
    let_go(guest)?;
    for process in [&read, &write] {
        guest.signal(process, 9)?;
        guest.wait(process, STEP)?;
    }
    rig.go_on(guest, "after a backup that failed", 1, STEP)?;
    super::backup(guest)?;
    rig.go_on(guest, "after the next backup", 1, SOON)?;
    let_go(guest)?;
    remove_hooks(guest)?;
    rig.stop(guest)?;
    stop(guest, Module::Ours, &daemon)
}

fn guest_agent_hook(guest: &Guest) -> Result<()> {
    const HOOK: &str = "/etc/qemu/fsfreeze-hook";
    const SCRIPT: &str = "/etc/qemu/fsfreeze-hook.d/10-note";
    let script = "#!/bin/sh
        case $1 in
        freeze | thaw) echo $1 >>/run/notes ;;
        *) exit 1 ;;
        esac";
    guest.sh(&format!(
        "grep -q qga-fsfreeze-hook.log {HOOK} && mkdir -p {HOOK}.d /var/log
         cat >{SCRIPT} <<'END'\n{script}\nEND\nchmod 755 {SCRIPT}"
    ))?;
    guest.writer_start("/writer")?;
    load(guest, guest.module(), &[])?;
    let daemon = guest.start_daemon_with("hooks.qemu = true")?;
    wait_for_daemon(guest)?;
    let backup = |what: &str| -> Result<()> {
        equal(what, observe(guest)?, good(&["/writer"]))?;
        guest.wait_until("all hooks are let go", STEP, || {
            Ok(guest.try_sh(&format!("test ! -e {OWED}"))?.status == Some(0))
        })
    };
    let check = || guest.sh("/payload/hv_vss_daemon check");
    backup("a backup with a script beside it")?;
    equal(
        "calls of the script",
        guest.read("/run/notes")?.as_str(),
        "freeze\nthaw\n",
    )?;
    let told = check()?;
    ensure!(
        told.contains(&format!("{SCRIPT}, required")) && !told.contains("passed over"),
        "check should name the script, and nothing as passed over:\n{told}"
    );

    guest.sh(&format!("rm {SCRIPT} /run/notes"))?;
    backup("a backup with nothing beside it")?;
    let told = check()?;
    ensure!(
        told.contains(&format!("{HOOK}, required")),
        "check should name the hook itself:\n{told}"
    );
    stop(guest, guest.module(), &daemon)?;
    guest.sh(&format!("rm -rf {HOOK}.d /etc/hv_vss")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_judged_by_what_must_and_what_may_be_there() {
        let expected = Expected { least: 3, most: 4 };
        let judge = |count, first, last, sum, length| {
            judge_rows(&[count, first, last, sum, length], expected).expect("five numbers")
        };
        assert_eq!(judge(3, 1, 3, 6, 600), None);
        assert_eq!(judge(4, 1, 4, 10, 800), None);
        for bad in [
            judge(2, 1, 2, 3, 400),
            judge(5, 1, 5, 15, 1000),
            // Another one instead of one that was committed, and one that is not whole.
            judge(3, 1, 4, 8, 600),
            judge(3, 2, 4, 9, 600),
            judge(4, 1, 4, 10, 799),
        ] {
            assert!(bad.is_some());
        }
        assert!(judge_rows(&[1], expected).is_err());
    }

    #[test]
    fn places_in_the_log_are_in_order() {
        let place = |text| lsn(text).expect("a place");
        assert!(place("0/1FFFFFF") < place("0/2000000\n") && place("0/FFFFFFFF") < place("1/0"));
        assert!(lsn("").is_err());
    }
}
