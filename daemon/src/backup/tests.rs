// SPDX-License-Identifier: GPL-2.0-only

//! The four rules, checked in every state that any order of events can reach, and in random orders.
//!
//! A [`World`] holds what is true: which requests are open, what the job is at, whether the freeze
//! has been broken. It judges each effect against that when it happens.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Freeze,
    /// For more than what is frozen, or about to be.
    FreezeMore,
    Thaw,
    HotBackup,
    /// Somebody rehearses, and has gone.
    Rehearse,
    NobodyRehearses,
    /// The job has frozen all, has failed to, has thawed all, has found that somebody else had.
    JobFrozen,
    JobFailed,
    JobThawed,
    JobThawedBadly,
    /// The job has found hooks and waits; they are ready, or one is not; all have been let go.
    HooksFound,
    HooksReady,
    HookFailed,
    HooksReleased,
    /// At rest: somebody has died who has left hooks that are let go.
    HooksLeft,
    /// The guard, or an operator, thaws.
    Broken,
    /// The module has let go of what it held for the last FREEZE, at the deadline or since the host was told that it
    /// has failed, or for an older one.
    Notice,
    SpoilingNotice,
    OldNotice,
    DeviceLost,
    /// Until something is due.
    Time,
    /// The kernel will not take the next answer.
    Late,
    /// There will be no way to freeze.
    NoDoor,
    Stop,
}

const ALL: [Event; 24] = [
    Event::Freeze,
    Event::FreezeMore,
    Event::Thaw,
    Event::HotBackup,
    Event::Rehearse,
    Event::NobodyRehearses,
    Event::JobFrozen,
    Event::JobFailed,
    Event::JobThawed,
    Event::JobThawedBadly,
    Event::HooksFound,
    Event::HooksReady,
    Event::HookFailed,
    Event::HooksReleased,
    Event::HooksLeft,
    Event::Broken,
    Event::Notice,
    Event::SpoilingNotice,
    Event::OldNotice,
    Event::DeviceLost,
    Event::Time,
    Event::Late,
    Event::NoDoor,
    Event::Stop,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Job {
    None,
    Freezing,
    /// Until it is told to go on, or to give up.
    Waiting,
    Frozen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Hooks {
    /// None is called, or all have been let go.
    None,
    Calling,
    Ready,
    Failed,
    Releasing,
}

/// What is true outside of the machine.
#[derive(Clone, Debug)]
struct Truth {
    /// The request that was read and not answered.
    open: Option<Request>,
    /// The FREEZE that the job was begun for: the module knows what it holds by that one.
    begun: u64,
    job: Job,
    /// The last one was a rehearsal.
    rehearses: bool,
    /// Its thaw has found that not all was frozen until then.
    spoilt: bool,
    hooks: Hooks,
    /// The job was told to thaw, or to give up.
    told: bool,
    /// The host was told that this FREEZE succeeded; no FREEZE since.
    reported: bool,
    /// What the host was told is frozen has not been so all the time.
    broken: bool,
    /// It has heard so by a THAW, or of an earlier one it has not.
    heard: bool,
    owed: bool,
    /// The job is for all that the host has asked for.
    covers: bool,
    /// The word for a later daemon.
    word: bool,
    refuse_answer: bool,
    /// That answer goes nowhere: nobody hears of it.
    is_unheard: bool,
    refuse_begin: bool,
    /// The last answer.
    said: Option<u32>,
}

#[derive(Clone, Debug)]
struct World {
    machine: Backup,
    truth: Truth,
    now: Instant,
    ids: u64,
}

impl Effects for Truth {
    fn answer(&mut self, request: &Request, code: u32) -> bool {
        self.said = Some(code);
        let open = self.open.take();
        let Some(open) = open else {
            panic!("an answer to {request:?}, which is answered or withdrawn");
        };
        assert_eq!(open.id, request.id, "an answer to another request");
        if std::mem::take(&mut self.refuse_answer) {
            // The kernel has failed it meanwhile.
            if std::mem::take(&mut self.is_unheard) {
                self.broken |= request.operation == op::THAW;
            } else {
                self.failed(request);
            }
            return false;
        }
        match (request.operation, code) {
            (op::FREEZE, status::OK) => {
                assert_eq!(
                    self.job,
                    Job::Frozen,
                    "FREEZE is good and nothing is frozen"
                );
                assert!(!self.told, "FREEZE is good and is being thawed");
                assert!(!self.rehearses, "FREEZE is good by a rehearsal");
                assert!(self.covers, "FREEZE is good and was for more");
                let are_quiet = matches!(self.hooks, Hooks::None | Hooks::Ready);
                assert!(are_quiet, "FREEZE is good and hooks are {:?}", self.hooks);
                self.reported = true;
                self.owed = false;
            }
            (op::THAW, status::OK) => {
                assert!(
                    self.job == Job::None || (self.rehearses && self.told),
                    "THAW is good and the job is not over"
                );
                assert!(!self.owed, "good after an earlier freeze that broke");
                assert!(
                    !(self.reported && self.broken),
                    "good after a freeze that broke"
                );
                self.reported = false;
            }
            (op::THAW, _) => {
                assert!(self.broken || !self.reported, "a THAW fails that is good");
                self.failed(request);
            }
            _ => {}
        }
        true
    }

    fn tell_thawed(&mut self, id: u64, _reason: u32) {
        assert!(
            id != 0 && self.reported && !self.rehearses,
            "a notice for a FREEZE that was not good"
        );
    }

    fn begin(&mut self, request: &Request, _text: String) -> Result<(), String> {
        self.begin_a_job(false)?;
        self.begun = request.id;
        self.owed |= self.reported && self.broken && !self.heard;
        (self.reported, self.broken, self.heard) = (false, false, false);
        self.covers = true;
        Ok(())
    }

    fn rehearse(&mut self, _with_hooks: bool, _text: String) -> Result<(), String> {
        assert_eq!(self.open, None, "a rehearsal while the host waits");
        self.begin_a_job(true)
    }

    fn covers(&self, _request: &Request) -> bool {
        self.covers
    }

    fn settle(&mut self) {
        assert!((self.reported || self.rehearses) && self.job == Job::Frozen);
    }

    fn thaw(&mut self, _by: Instant) {
        assert_eq!(self.job, Job::Frozen);
        self.told = true;
    }

    fn call_off(&mut self) {
        assert_ne!(self.job, Job::None, "nothing to call off");
        self.told = true;
    }

    fn refused(&mut self, request: &Request, _why: &str) {
        assert_eq!(request.operation, op::FREEZE);
        // It may have come too late for the kernel.
        let said = self.said;
        assert_eq!(said, Some(status::FAIL), "refused and not told so");
    }

    fn go_on(&mut self) {
        assert_eq!(
            self.hooks,
            Hooks::Ready,
            "it goes on and the hooks are not ready"
        );
        assert_eq!(self.job, Job::Waiting);
        self.job = Job::Freezing;
    }

    fn finish(&mut self, verdict: Verdict, why: Option<&str>) {
        assert_eq!(
            verdict != Verdict::Good,
            why.is_some(),
            "what is not good has a reason"
        );
        assert!(
            !(verdict == Verdict::Good && self.is_broken()),
            "called good after a freeze that broke"
        );
        assert!(
            !(verdict == Verdict::Good && self.spoilt),
            "called good after a thaw that was not"
        );
        assert_eq!(self.job, Job::None, "finished, and the job is not over");
    }

    fn release(&mut self, verdict: Option<Verdict>) -> bool {
        assert!(
            self.job == Job::None || self.told,
            "hooks are let go and the job is neither over nor to be so"
        );
        assert!(
            !(verdict == Some(Verdict::Good) && (self.is_broken() || self.job != Job::None)),
            "hooks are told of a good backup"
        );
        if self.hooks == Hooks::None {
            return false;
        }
        self.hooks = Hooks::Releasing;
        true
    }

    fn remember(&mut self, broken: Option<&str>) {
        assert!(
            self.job == Job::None || !self.rehearses || broken.is_none(),
            "a word of a rehearsal"
        );
        self.word = broken.is_some();
    }

    fn prepare(&mut self) {
        assert_eq!(
            self.job,
            Job::None,
            "a look-up while something may be frozen"
        );
    }

    fn say(&mut self, _level: Level, _text: String) {}
}

impl Truth {
    fn begin_a_job(&mut self, rehearses: bool) -> Result<(), String> {
        assert_eq!(self.job, Job::None, "two jobs");
        assert_eq!(
            self.hooks,
            Hooks::None,
            "the hooks of the last are not let go"
        );
        if std::mem::take(&mut self.refuse_begin) {
            return Err("no door".into());
        }
        (self.job, self.told, self.rehearses) = (Job::Freezing, false, rehearses);
        self.spoilt = false;
        Ok(())
    }

    /// Whether there is a job that the host waits for, or counts on.
    fn is_for_the_host(&self) -> bool {
        self.job != Job::None && !self.rehearses
    }

    /// Whether the last one has not lasted, if it was the host's.
    fn is_broken(&self) -> bool {
        self.broken && !self.rehearses
    }

    /// The host hears that this has failed.
    fn failed(&mut self, request: &Request) {
        if request.operation == op::THAW {
            (self.broken, self.heard, self.owed) = (true, true, false);
        }
    }
}

impl World {
    fn new() -> Self {
        World {
            machine: Backup::new(Duration::from_secs(60), None, false),
            truth: Truth {
                open: None,
                begun: 0,
                job: Job::None,
                rehearses: false,
                spoilt: false,
                hooks: Hooks::None,
                told: false,
                reported: false,
                broken: false,
                heard: false,
                owed: false,
                covers: true,
                word: false,
                refuse_answer: false,
                is_unheard: false,
                refuse_begin: false,
                said: None,
            },
            now: Instant::now(),
            ids: 0,
        }
    }

    /// One in which an earlier daemon has left hooks that are let go.
    fn with_hooks_left() -> Self {
        let mut world = World::new();
        world.machine = Backup::new(Duration::from_secs(60), None, true);
        world.truth.hooks = Hooks::Releasing;
        world
    }

    /// What tells two worlds apart, ids and times aside.
    fn state(&self) -> String {
        let Truth {
            open, job, hooks, ..
        } = &self.truth;
        let Truth {
            told,
            rehearses,
            reported,
            broken,
            heard,
            owed,
            covers,
            refuse_answer,
            is_unheard,
            refuse_begin,
            ..
        } = self.truth;
        let operation = open.map(|it| it.operation);
        let Backup {
            broken: known,
            stopping,
            spent,
            told: known_to,
            untold,
            ..
        } = &self.machine;
        let phase = self.machine.phase();
        let kept = match &self.machine.phase {
            Phase::Ending { kept, .. } | Phase::Thawing { kept, .. } => kept.is_some(),
            _ => false,
        };
        let is_good = match &self.machine.phase {
            Phase::Ending { whose, .. } => *whose == Whose::Nobody(None),
            _ => false,
        };
        format!(
            "{phase} {kept} {is_good} {} {known_to} {} {stopping} {spent} {operation:?} {job:?} {hooks:?} {told} {rehearses} {reported} \
             {broken} {heard} {owed} {covers} {refuse_answer} {is_unheard} {refuse_begin}",
            known.is_some(),
            untold.is_some()
        )
    }

    /// Whether this can happen now.
    fn may(&self, event: Event) -> bool {
        let Truth {
            job, hooks, told, ..
        } = self.truth;
        match event {
            Event::JobFrozen => job == Job::Freezing,
            Event::JobFailed => job == Job::Freezing || (job == Job::Waiting && told),
            // One that was called off by then is not called any hook for.
            Event::HooksFound => job == Job::Freezing && hooks == Hooks::None && !told,
            Event::HooksReady | Event::HookFailed => hooks == Hooks::Calling,
            Event::HooksReleased => hooks == Hooks::Releasing,
            Event::HooksLeft => self.machine.is_at_rest(),
            Event::JobThawed | Event::JobThawedBadly => job == Job::Frozen && told,
            Event::Time => self.machine.next().is_some(),
            _ => true,
        }
    }

    fn happen(&mut self, event: Event) {
        if !self.may(event) {
            return;
        }
        let World {
            machine,
            truth,
            now,
            ids,
        } = self;
        let mut ask = |operation, truth: &mut Truth| {
            *ids += 1;
            let request = Request {
                id: *ids,
                operation,
                time_left: Duration::from_secs(30),
                about: None,
            };
            if let Some(last) = truth.open.replace(request) {
                // The kernel shows one at a time: it has failed the last.
                truth.broken = true;
                if !std::mem::take(&mut truth.is_unheard) {
                    truth.failed(&last);
                }
            }
            request
        };
        match event {
            Event::Freeze => {
                let request = ask(op::FREEZE, truth);
                machine.request(*now, request, truth);
            }
            Event::FreezeMore => {
                let request = ask(op::FREEZE, truth);
                truth.covers = truth.job == Job::None;
                truth.broken |= truth.job == Job::Frozen && !truth.rehearses;
                machine.request(*now, request, truth);
            }
            Event::Thaw => {
                let request = ask(op::THAW, truth);
                machine.request(*now, request, truth);
            }
            Event::HotBackup => {
                let request = ask(op::HOT_BACKUP, truth);
                machine.request(*now, request, truth);
            }
            Event::Rehearse => {
                let rehearsal = Rehearsal {
                    time: Duration::from_secs(5),
                    with_hooks: true,
                };
                let was = machine.clone();
                if machine.rehearse(*now, rehearsal, truth).is_err() {
                    assert_eq!(*machine, was, "it is refused and leaves a trace");
                }
            }
            Event::NobodyRehearses => machine.nobody_rehearses(*now, truth),
            Event::JobFrozen => {
                truth.job = Job::Frozen;
                let begun = Begun {
                    since: *now,
                    counts: String::new(),
                    names: Vec::new(),
                };
                machine.frozen(*now, Ok(begun), truth);
            }
            Event::JobFailed => {
                truth.job = Job::None;
                machine.frozen(*now, Err("it cannot".into()), truth);
            }
            Event::JobThawed => {
                truth.job = Job::None;
                machine.thawed(Ok(()), truth);
            }
            Event::JobThawedBadly => {
                truth.job = Job::None;
                truth.broken |= !truth.rehearses;
                truth.spoilt = true;
                machine.thawed(Err("somebody else had".into()), truth);
            }
            Event::HooksFound => (truth.job, truth.hooks) = (Job::Waiting, Hooks::Calling),
            Event::HooksReady => {
                truth.hooks = Hooks::Ready;
                machine.quiesced(*now, Ok(()), truth);
            }
            Event::HookFailed => {
                truth.hooks = Hooks::Failed;
                machine.quiesced(*now, Err("a hook failed".into()), truth);
            }
            Event::HooksLeft => {
                truth.hooks = Hooks::Releasing;
                machine.releases();
            }
            Event::HooksReleased => {
                truth.hooks = Hooks::None;
                machine.released(truth);
            }
            Event::Broken => {
                truth.broken |= truth.is_for_the_host() && !is_thawing(machine);
                let broken = Break {
                    why: "an operator".into(),
                    reason: Some(thawed::OPERATOR),
                };
                machine.end_early(*now, broken, truth);
            }
            Event::Notice | Event::SpoilingNotice => {
                let reason = match event {
                    Event::Notice => thawed::DEADLINE,
                    _ => thawed::CALLED_OFF,
                };
                let only_thaws = event == Event::Notice && is_thawing(machine);
                truth.broken |= truth.is_for_the_host() && !only_thaws;
                let id = match &machine.phase {
                    Phase::Freezing { .. } | Phase::Frozen { .. } | Phase::Thawing { .. } => {
                        truth.begun
                    }
                    Phase::Rehearsing { .. } => 0,
                    Phase::Idle | Phase::Ending { .. } | Phase::Releasing(_) => *ids,
                };
                machine.notice(*now, id, (reason, "the module"), truth);
            }
            Event::OldNotice => {
                let why = (thawed::CALLED_OFF, "the module, of old");
                machine.notice(*now, 0, why, truth);
            }
            Event::DeviceLost => {
                truth.broken |= truth.is_for_the_host();
                // What was open went with it, and so does what is said to it.
                let gone = truth.open.take();
                if let Some(gone) = gone {
                    truth.open = Some(gone);
                    truth.refuse_answer = true;
                }
                machine.device_lost(*now, truth);
                if truth.open.take().is_some() {
                    truth.refuse_answer = false;
                }
                if let Phase::Thawing { request, .. } = &machine.phase {
                    // Its answer will go nowhere.
                    truth.open = Some(*request);
                    (truth.refuse_answer, truth.is_unheard) = (true, true);
                }
            }
            Event::Time => {
                let Some(next) = machine.next() else { return };
                *now = next;
                // What hangs in its thaw may be good yet.
                truth.broken |= truth.is_for_the_host() && !is_thawing(machine);
                machine.time(*now, truth);
            }
            Event::Late => truth.refuse_answer = true,
            Event::NoDoor => truth.refuse_begin = true,
            Event::Stop => {
                truth.broken |= truth.is_for_the_host() && !is_thawing(machine);
                machine.stop(*now, truth);
            }
        }
        self.check();
    }

    fn check(&self) {
        let World { machine, truth, .. } = self;
        assert_eq!(
            truth.job == Job::None,
            machine.is_idle(),
            "the machine has lost sight of the job"
        );
        assert!(
            truth.job == Job::None || truth.told || machine.next().is_some(),
            "frozen without a way out"
        );
        assert!(
            truth.job != Job::None || matches!(truth.hooks, Hooks::None | Hooks::Releasing),
            "hooks that nobody lets go: {:?}",
            truth.hooks
        );
        // One request waits for the job or the hooks, or for none.
        let waits = matches!(
            machine.phase,
            Phase::Freezing { .. }
                | Phase::Thawing { .. }
                | Phase::Ending {
                    waiting: Some(_),
                    ..
                }
                | Phase::Releasing(Some(_))
        );
        assert!(
            truth.open.is_none() || waits,
            "a request that nobody will answer: {:?}",
            truth.open
        );
        assert_eq!(
            truth.word,
            machine.broken.is_some() || machine.untold.is_some(),
            "the word that is left is not what is known"
        );
    }

    /// From here on nothing happens but what must: it has to come to rest, everything answered.
    fn drain(mut self) {
        for _ in 0..6 {
            match (self.truth.job, self.truth.told) {
                (Job::None, _) => self.happen(Event::HooksReleased),
                (Job::Freezing, true) => self.happen(Event::JobFrozen),
                (Job::Waiting, true) => self.happen(Event::JobFailed),
                (Job::Frozen, true) => self.happen(Event::JobThawed),
                (_, false) => self.happen(Event::Time),
            }
        }
        assert_eq!(self.machine.phase, Phase::Idle, "it does not come to rest");
        assert_eq!(self.truth.open, None, "a request was not answered");
        assert_eq!(self.truth.hooks, Hooks::None, "a hook was not let go");
    }
}

#[test]
fn every_state_keeps_the_rules() {
    let mut seen = HashSet::new();
    let mut worlds = vec![World::new(), World::with_hooks_left()];
    while let Some(world) = worlds.pop() {
        if !seen.insert(world.state()) {
            continue;
        }
        world.clone().drain();
        for event in ALL {
            let mut next = world.clone();
            next.happen(event);
            worlds.push(next);
        }
    }
    assert!(
        seen.len() > 100,
        "the walk has stopped early: {} states",
        seen.len()
    );
}

proptest! {
    #[test]
    fn any_order_of_events_keeps_the_rules(order in proptest::collection::vec(0..ALL.len(), 0..200)) {
        let mut world = World::new();
        for index in order {
            world.happen(ALL[index]);
        }
        world.drain();
    }
}

/// The host has its copies then: whoever thaws breaks nothing any more.
fn is_thawing(machine: &Backup) -> bool {
    matches!(machine.phase, Phase::Thawing { .. })
}

fn after(events: &[Event]) -> World {
    let mut world = World::new();
    for event in events {
        world.happen(*event);
    }
    world
}

#[test]
fn a_clean_backup_is_good() {
    use Event::{Freeze, JobFrozen, JobThawed, Thaw};
    let world = after(&[Freeze, JobFrozen, Thaw, JobThawed]);
    let rest = Backup {
        spent: true,
        ..Backup::new(Duration::from_secs(60), None, false)
    };
    assert_eq!(world.machine, rest);
}

#[test]
fn whoever_thaws_after_thaw_has_come_breaks_nothing() {
    for reason in [thawed::DEADLINE, thawed::OPERATOR, thawed::CRASH] {
        for (thawing, told) in [(true, status::OK), (false, status::FAIL)] {
            let mut world = after(&[Event::Freeze, Event::JobFrozen]);
            if thawing {
                world.happen(Event::Thaw);
            }
            let broken = Break {
                why: "somebody thaws".into(),
                reason: Some(reason),
            };
            world.truth.broken |= !thawing;
            world.machine.end_early(world.now, broken, &mut world.truth);
            world.happen(Event::JobThawed);
            if !thawing {
                world.happen(Event::Thaw);
            }
            assert_eq!(world.truth.said, Some(told), "{reason}");
        }
    }
    let world = after(&[
        Event::Freeze,
        Event::JobFrozen,
        Event::Thaw,
        Event::Stop,
        Event::JobThawed,
    ]);
    assert_eq!(world.truth.said, Some(status::OK));
    assert!(world.machine.is_over());
}

#[test]
fn a_freeze_that_fails_leaves_the_thaw_to_fail_that_an_earlier_one_broke_for() {
    use Event::{Broken, Freeze, FreezeMore, JobFailed, JobFrozen, JobThawed, Thaw};
    for events in [
        &[Freeze, JobFrozen, FreezeMore, JobThawed, JobFailed][..],
        &[Freeze, JobFrozen, Broken, JobThawed, Freeze, JobFailed],
        &[
            Freeze, JobFrozen, Broken, JobThawed, Freeze, Broken, JobFailed, Freeze, JobFailed,
        ],
    ] {
        let mut world = after(events);
        assert!(world.truth.word, "{events:?}");
        world.happen(Thaw);
        assert_eq!(world.truth.said, Some(status::FAIL), "{events:?}");
        // It is told once.
        world.happen(Freeze);
        world.happen(JobFailed);
        world.happen(Thaw);
        assert_eq!(world.truth.said, Some(status::OK), "{events:?}");
    }
    // Nor is one of which the host has heard by the FREEZE itself.
    let mut world = after(&[Freeze, Broken, JobFailed, Freeze, JobFailed]);
    world.happen(Thaw);
    assert_eq!(world.truth.said, Some(status::OK));
}

#[test]
fn an_operator_who_wants_a_thaw_has_no_freeze_begin_that_has_waited() {
    use Event::{Broken, Freeze, FreezeMore, JobFrozen, JobThawed};
    let mut world = after(&[Freeze, JobFrozen, FreezeMore, Broken]);
    assert_eq!(world.truth.said, Some(status::FAIL));
    world.happen(JobThawed);
    assert_eq!(world.machine.phase(), "idle");
    world.drain();
}

#[test]
fn what_the_module_lets_go_breaks_each_freeze_that_it_was_held_for() {
    use Event::{Freeze, JobFrozen, JobThawed, Notice, Thaw};
    for events in [
        &[Freeze, JobFrozen, Freeze, Notice][..],
        &[Freeze, JobFrozen, Freeze, Freeze, Notice],
    ] {
        let mut world = after(events);
        assert_eq!(world.machine.phase(), "ending", "{events:?}");
        world.happen(JobThawed);
        world.happen(Thaw);
        assert_eq!(world.truth.said, Some(status::FAIL), "{events:?}");
    }
}

#[test]
fn in_v1_a_second_thaw_fails_for_the_first_may_have_been_the_kernels() {
    let mut world = after(&[
        Event::Freeze,
        Event::JobFrozen,
        Event::Thaw,
        Event::JobThawed,
    ]);
    let thaw = Request {
        id: 0,
        operation: op::THAW,
        time_left: Duration::from_secs(30),
        about: None,
    };
    world.truth.open = Some(thaw);
    // What the model does not know of.
    world.truth.broken = true;
    world.machine.request(world.now, thaw, &mut world.truth);
    assert_eq!(world.truth.said, Some(status::FAIL));
    world.happen(Event::Freeze);
    world.happen(Event::JobFailed);
    world.truth.open = Some(thaw);
    world.truth.broken = false;
    world.machine.request(world.now, thaw, &mut world.truth);
    assert_eq!(world.truth.said, Some(status::OK));
}

#[test]
fn a_rehearsal_is_nothing_to_the_host() {
    use Event::{Freeze, HotBackup, JobFrozen, JobThawed, Rehearse, Thaw, Time};
    let mut world = after(&[Rehearse, JobFrozen]);
    assert_eq!(world.machine.phase(), "rehearsing");
    let until = world.now + Duration::from_secs(5);
    assert_eq!(world.machine.next(), Some(until));
    // It asks whether it could take a backup.
    world.happen(HotBackup);
    assert_eq!(world.truth.said, Some(status::OK));
    assert_eq!(world.machine.phase(), "rehearsing");
    world.happen(Time);
    assert!(world.truth.told && world.now == until);
    world.happen(JobThawed);
    assert_eq!(world.machine, World::new().machine);
    // Its THAW, for which nothing is frozen, has the module let go of all.
    for events in [&[Rehearse][..], &[Rehearse, JobFrozen]] {
        let mut world = after(events);
        world.happen(Thaw);
        assert_eq!(world.truth.said, Some(status::OK));
        assert!(world.truth.told);
        world.drain();
    }
    // What it has not heard of an earlier backup it still has to.
    let mut world = after(&[Freeze, JobFrozen, Event::Broken, JobThawed]);
    for event in [Rehearse, JobFrozen, Time, JobThawed] {
        world.happen(event);
    }
    assert!(world.truth.word);
    world.happen(Thaw);
    assert_eq!(world.truth.said, Some(status::FAIL));
}

#[test]
fn a_freeze_during_a_rehearsal_is_good_by_a_freeze_of_its_own() {
    use Event::{Freeze, HooksFound, HooksReady, HooksReleased, JobFailed, JobFrozen, JobThawed};
    use Event::{Rehearse, Thaw, Time};
    for (events, ends) in [
        (&[JobFrozen][..], &[JobThawed][..]),
        (&[], &[JobFailed]),
        (&[HooksFound], &[JobFailed, HooksReleased]),
        (
            &[HooksFound, HooksReady, JobFrozen],
            &[JobThawed, HooksReleased],
        ),
    ] {
        let mut world = after(&[Rehearse]);
        events.iter().for_each(|it| world.happen(*it));
        world.happen(Freeze);
        assert!(world.truth.told && world.truth.said.is_none(), "{events:?}");
        ends.iter().for_each(|it| world.happen(*it));
        assert_eq!(world.machine.phase(), "freezing", "{events:?}");
        for event in [JobFrozen, Thaw, JobThawed] {
            world.happen(event);
            assert_ne!(world.truth.said, Some(status::FAIL), "{events:?}");
        }
        assert!(!world.truth.reported, "{events:?}");
        // One that hangs is not waited for without end.
        let mut world = after(&[Rehearse]);
        events.iter().for_each(|it| world.happen(*it));
        for event in [Freeze, Time, Time] {
            world.happen(event);
        }
        assert_eq!(world.truth.said, Some(status::FAIL), "{events:?}");
        world.drain();
    }
}

#[test]
fn a_rehearsal_that_nobody_waits_for_ends_and_so_does_one_that_cannot_last() {
    use Event::{JobFrozen, JobThawed, NobodyRehearses, Rehearse, Stop};
    for events in [&[Rehearse][..], &[Rehearse, JobFrozen]] {
        for end in [NobodyRehearses, Event::Broken, Event::Notice, Stop] {
            let mut world = after(events);
            world.happen(end);
            assert!(world.truth.told && !world.truth.word, "{end:?}");
            world.happen(JobFrozen);
            world.happen(JobThawed);
            assert_eq!(world.machine.phase(), "idle", "{end:?}");
        }
    }
    let mut world = World::new();
    let rehearsal = Rehearsal {
        time: Duration::MAX,
        with_hooks: true,
    };
    let refused = world
        .machine
        .rehearse(world.now, rehearsal, &mut world.truth);
    assert!(matches!(refused, Err(NoRehearsal::Failed(_))));
    world.happen(Event::Freeze);
    let busy = world
        .machine
        .rehearse(world.now, Rehearsal::default(), &mut world.truth);
    assert!(matches!(busy, Err(NoRehearsal::Busy(_))));
}

#[test]
fn a_word_that_an_earlier_daemon_left_fails_the_thaw_and_ends_with_the_next_freeze() {
    let mut world = World::new();
    world.machine = Backup::new(
        Duration::from_secs(60),
        Some("it was stopped".into()),
        false,
    );
    (world.truth.broken, world.truth.word) = (true, true);
    world.happen(Event::Thaw);
    world.happen(Event::Thaw);
    world.happen(Event::Freeze);
    assert!(!world.truth.word);
    world.drain();
}

#[test]
fn whoever_minds_the_deadline_has_a_second_more_than_it() {
    let world = after(&[Event::Freeze, Event::JobFrozen]);
    let until = world.now + Duration::from_secs(61);
    assert_eq!(world.machine.next(), Some(until));
}

#[test]
fn a_freeze_waits_for_the_hooks_of_the_last_backup_and_then_begins() {
    use Event::{Freeze, HooksFound, HooksReady, HooksReleased, JobFrozen, JobThawed, Thaw};
    let mut world = after(&[Freeze, HooksFound, HooksReady, JobFrozen, Thaw, JobThawed]);
    assert_eq!(world.truth.said, Some(status::OK));
    assert_eq!(world.machine.phase(), "releasing");
    world.happen(Freeze);
    assert_eq!(world.truth.job, Job::None);
    world.happen(HooksReleased);
    assert_eq!(world.truth.job, Job::Freezing);
    world.drain();
}

#[test]
fn a_freeze_waits_for_the_end_of_one_that_was_called_off_and_then_begins() {
    use Event::{Broken, Freeze, JobFailed, Thaw, Time};
    let mut world = after(&[Freeze, Broken]);
    assert_eq!(world.truth.said, Some(status::FAIL));
    world.happen(Freeze);
    assert_eq!(world.machine.phase(), "ending");
    // What comes to light of the last one is not its fault.
    let broken = Break {
        why: "somebody else has thawed".into(),
        reason: Some(thawed::FOREIGN),
    };
    world.machine.end_early(world.now, broken, &mut world.truth);
    assert!(world.truth.open.is_some());
    world.happen(JobFailed);
    assert_eq!(world.machine.phase(), "freezing");
    world.drain();
    // It does not wait for good, and not against the host's will.
    for (event, said) in [(Time, Some(status::FAIL)), (Thaw, Some(status::FAIL))] {
        let mut world = after(&[Freeze, Broken, Freeze, Time]);
        world.happen(event);
        assert_eq!(world.truth.said, said, "{event:?}");
        assert_eq!(world.machine.phase(), "ending");
        world.happen(JobFailed);
        assert_eq!(world.machine.phase(), "idle");
    }
}

#[test]
fn what_is_about_to_end_refuses_no_freeze_and_what_hangs_does() {
    use Event::{Broken, Freeze, JobFailed, JobFrozen, JobThawed, Rehearse, Time};
    for (events, ends) in [
        (&[Rehearse, JobFrozen, Time][..], JobThawed),
        (&[Rehearse, Broken], JobFailed),
        (&[Freeze, JobFrozen, Broken], JobThawed),
        (&[Freeze, Broken], JobFailed),
    ] {
        let mut world = after(events);
        assert_eq!(world.machine.phase(), "ending");
        assert!(!world.machine.refuses(false), "{events:?}");
        // It would wait, and be refused in the end.
        assert!(world.machine.refuses(true), "{events:?}");
        world.happen(Freeze);
        assert!(world.truth.open.is_some() && !world.machine.refuses(true));
        world.happen(ends);
        assert_eq!(world.machine.phase(), "freezing", "{events:?}");
        world.drain();
        // So does one that has had its time.
        let mut world = after(events);
        world.happen(Time);
        assert_eq!(world.machine.phase(), "ending");
        assert!(world.machine.refuses(false), "{events:?}");
        world.happen(ends);
        assert!(!world.machine.refuses(false), "{events:?}");
    }
}

#[test]
fn a_freeze_that_has_waited_has_as_long_as_the_host_waits() {
    use Event::{Broken, Freeze, FreezeMore, HooksFound, HooksReady, HooksReleased};
    use Event::{JobFailed, JobFrozen, JobThawed};
    let limit = Duration::from_secs(30) - MARGIN;
    for events in [
        &[Freeze, JobFrozen, FreezeMore, JobThawed][..],
        &[Freeze, Broken, Freeze, JobFailed],
        &[
            Freeze,
            HooksFound,
            HooksReady,
            Broken,
            Freeze,
            JobFailed,
            HooksReleased,
        ],
    ] {
        let world = after(events);
        assert_eq!(world.machine.phase(), "freezing", "{events:?}");
        assert_eq!(world.machine.next(), Some(world.now + limit), "{events:?}");
    }
    // What is waited for meanwhile has less time, but for hooks.
    let mut world = after(&[Freeze, Broken, Freeze]);
    let came = world.now;
    world.happen(Event::Time);
    assert_eq!(world.machine.next(), Some(came + LAST));
    let world = after(&[Freeze, HooksFound, HooksReady, Broken, Freeze, JobFailed]);
    assert_eq!(world.machine.phase(), "releasing");
    assert_eq!(world.machine.next(), Some(world.now + limit));
}

#[test]
fn hooks_are_let_go_beside_what_hangs_and_the_next_freeze_waits_for_both() {
    use Event::{Broken, Freeze, HooksFound, HooksReady, HooksReleased};
    use Event::{JobFailed, JobFrozen, JobThawed, Thaw, Time};
    let begun = [Freeze, HooksFound, HooksReady];
    for (events, end) in [
        (&[JobFrozen, Thaw][..], JobThawed),
        (&[JobFrozen, Broken], JobThawed),
        (&[Broken], JobFailed),
    ] {
        let events = [&begun[..], events].concat();
        for hooks_end_first in [false, true] {
            let mut world = after(&events);
            let called = world.now;
            assert_eq!(world.truth.hooks, Hooks::Ready, "{events:?}");
            world.happen(Time);
            assert_eq!(world.now, called + KEEP);
            assert_eq!(world.truth.hooks, Hooks::Releasing, "{events:?}");
            let ends = match hooks_end_first {
                true => [HooksReleased, end],
                false => [end, HooksReleased],
            };
            world.happen(ends[0]);
            assert_ne!(world.machine.phase(), "idle", "{events:?}, {ends:?}");
            world.happen(ends[1]);
            assert_eq!(world.machine.phase(), "idle", "{events:?}, {ends:?}");
            // What was good in the end is told so.
            let good = events.contains(&Thaw);
            let said = if good { status::OK } else { status::FAIL };
            if events.contains(&Thaw) || end == JobFailed {
                assert_eq!(world.truth.said, Some(said), "{events:?}");
            }
        }
    }
}
