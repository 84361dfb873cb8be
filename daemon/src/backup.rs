// SPDX-License-Identifier: GPL-2.0-only

//! What is decided: one backup after the other, as a state machine without I/O.
//!
//! Events are method calls: a request of the host, an outcome of the job that freezes or of the hooks,
//! the word of whoever thaws when the daemon cannot, time that has passed, a stop. What is to be done
//! about them leaves through [`Effects`]. Four rules hold, whatever happens in which order:
//!
//! - a freeze that did not last is never called good: its THAW fails, until the host has heard that or another
//!   FREEZE is good; and a rehearsal is none to the host;
//! - each request is answered once. One that the kernel has withdrawn is not: it shows a daemon only
//!   one request at a time, so the next one says that the last has ended;
//! - whatever is frozen has a way out: a time at which it is called off, or a thaw under way;
//! - nothing is frozen before all hooks are ready for it, and hooks are let go after all is thawed, but for
//!   what hangs.
//!
//! It knows no device, no file system and no thread.

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use hv_vss_uapi::{op, status, thawed};
use serde::{Deserialize, Serialize};

use crate::device::{About, Request};
use crate::logbook::Level;

/// How long before the kernel gives up a freeze is called off, so that the host hears why.
const MARGIN: Duration = Duration::from_secs(2);
/// How much later than whoever else minds the deadline the machine does.
const SLACK: Duration = Duration::from_secs(1);
/// How long a FREEZE waits for the end of one that was called off. Most end at once; what hangs may never.
const LAST: Duration = Duration::from_secs(5);
/// How long hooks are kept once the job is to thaw or to give up. What is not over by then hangs, and all else
/// is thawed.
const KEEP: Duration = Duration::from_secs(3);
/// How long a rehearsal may take until all is frozen: as long as most kernels wait for a FREEZE.
const MAKE: Duration = Duration::from_secs(15 * 60);

/// What the machine asks its surroundings to do. None of it may call back.
pub trait Effects {
    /// Answers `request`; false when the kernel does not take the answer.
    fn answer(&mut self, request: &Request, status: u32) -> bool;
    /// Tells the kernel that the freeze of request `id` has ended: one of `hv_vss_uapi::thawed`.
    fn tell_thawed(&mut self, id: u64, reason: u32);
    /// Begins to freeze, with `text` as the first line of this backup's log. Or says why not.
    fn begin(&mut self, request: &Request, text: String) -> Result<(), String>;
    /// The same for a rehearsal, which is for nobody; it calls no hooks unless it is to.
    fn rehearse(&mut self, with_hooks: bool, text: String) -> Result<(), String>;
    /// Whether what is frozen is all that this other FREEZE asks for.
    fn covers(&self, request: &Request) -> bool;
    /// All is frozen, and the host has been told so if it has asked.
    fn settle(&mut self);
    /// The job is to thaw what it has frozen, and to leave by then what hangs.
    fn thaw(&mut self, by: Instant);
    /// The job is to give up, whatever it is at, and what is frozen to be thawed.
    fn call_off(&mut self);
    /// There will be no backup for this FREEZE, and why.
    fn refused(&mut self, request: &Request, why: &str);
    /// The job, which waits for the hooks, is to go on and freeze.
    fn go_on(&mut self);
    /// The job is over and nothing is frozen any more; why the backup is not good.
    fn finish(&mut self, verdict: Verdict, why: Option<&str>);
    /// Whatever hook was called is to be let go, after [`Effects::finish`] or, with all thawed but what hangs,
    /// before it; `None` when nobody can tell yet how the backup went. False when none is left, else
    /// [`Backup::released`] follows, once.
    fn release(&mut self, verdict: Option<Verdict>) -> bool;
    /// Leaves word for a later daemon that a THAW must fail and why, or takes it back.
    fn remember(&mut self, broken: Option<&str>);
    /// Makes the plan for a backup that may come soon.
    fn prepare(&mut self);
    /// A line for the log.
    fn say(&mut self, level: Level, text: String);
}

/// How a backup went, as far as this machine can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// All was frozen from the answer to FREEZE until THAW.
    Good,
    /// FREEZE was good, and the freeze did not last until THAW.
    Broken,
    /// FREEZE was not good.
    Failed,
}

/// How a freeze came about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begun {
    /// When the first file system was about to be frozen.
    pub since: Instant,
    /// What is frozen, in words.
    pub counts: String,
    /// The file systems that are, by name.
    pub names: Vec<String>,
}

/// What is to be rehearsed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rehearsal {
    /// How long all is to stay frozen.
    pub time: Duration,
    /// Whether hooks are called.
    pub with_hooks: bool,
}

/// Why there is no rehearsal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoRehearsal {
    /// Something else is under way.
    Busy(&'static str),
    /// It cannot be.
    Failed(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    /// The job freezes, or waits for hooks; the request is open until `give_up`.
    Freezing {
        request: Request,
        give_up: Instant,
    },
    /// FREEZE was answered; thawed at `until` if nobody else has by then.
    Frozen {
        ids: Ids,
        until: Instant,
    },
    /// The job thaws; the request is open.
    Thawing {
        ids: Ids,
        request: Request,
        kept: Kept,
    },
    /// The job is at a rehearsal; thawed, or called off, at `until`.
    Rehearsing {
        /// How long it is to stay frozen once all is; `None` from then on.
        time: Option<Duration>,
        until: Instant,
    },
    /// Called off, or a rehearsal that is over: the job has yet to end. The next FREEZE may wait for that.
    Ending {
        whose: Whose,
        verdict: Verdict,
        waiting: Waiting,
        kept: Kept,
    },
    /// Nothing is frozen; hooks have yet to end. The next FREEZE may wait for that.
    Releasing(Waiting),
}

/// From the FREEZE that the job was begun for, by which the module knows what it holds, to the last one that was
/// answered by it.
type Ids = RangeInclusive<u64>;

/// Whose freeze it was.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Whose {
    /// The host's.
    Host,
    /// Nobody's: a rehearsal, and why it is not good.
    Nobody(Option<Cow<'static, str>>),
}

/// A FREEZE that waits for the end of the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waiter {
    request: Request,
    /// How long it waits for a job that was called off.
    patience: Instant,
    /// When the host does not wait any longer, be it for that or for the freeze.
    give_up: Instant,
}

type Waiting = Option<Waiter>;

/// Until when hooks are kept although the job does not end; `None` from then on.
type Kept = Option<Instant>;

/// Why what is (to be) frozen is given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Break {
    /// In words.
    pub why: Cow<'static, str>,
    /// One of `hv_vss_uapi::thawed`, for a kernel that does not know yet.
    pub reason: Option<u32>,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    phase: Phase,
    /// From the first freeze to the thaw at the latest.
    deadline: Duration,
    /// Why the last freeze did not last.
    broken: Option<Cow<'static, str>>,
    /// The host has heard of that, by a FREEZE or a THAW that failed.
    told: bool,
    /// Why an earlier one did not, of which the host has not heard yet. A FREEZE that fails after it leaves it with
    /// the THAW that was to end it.
    untold: Option<Cow<'static, str>>,
    /// The last freeze has ended with its THAW.
    spent: bool,
    stopping: bool,
}

impl Backup {
    /// A machine at rest. `broken` is the word that an earlier daemon has left, if there is one; whether
    /// it has left hooks, too, that are being let go.
    pub fn new(deadline: Duration, broken: Option<String>, releasing: bool) -> Self {
        Backup {
            phase: match releasing {
                true => Phase::Releasing(None),
                false => Phase::Idle,
            },
            deadline,
            broken: broken.map(Cow::Owned),
            told: false,
            untold: None,
            spent: false,
            stopping: false,
        }
    }

    /// Hooks that somebody has left who has died are being let go. Only while it is [at rest](Backup::is_at_rest).
    pub fn releases(&mut self) {
        self.phase = Phase::Releasing(None);
    }

    /// From the next FREEZE on.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Whether no job is under way.
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle | Phase::Releasing(_))
    }

    /// Whether there is nothing to be done, not even for hooks.
    pub fn is_at_rest(&self) -> bool {
        self.phase == Phase::Idle && !self.stopping
    }

    /// Whether a job freezes.
    pub fn is_freezing(&self) -> bool {
        matches!(
            self.phase,
            Phase::Freezing { .. } | Phase::Rehearsing { time: Some(_), .. }
        )
    }

    /// Whether the job that is ending would refuse a FREEZE: it hangs, be it that it `is_stuck` or that its time is
    /// over. One that does not is as good as over, and a FREEZE that waits for it is not refused yet.
    pub fn refuses(&self, is_stuck: bool) -> bool {
        match self.phase {
            Phase::Ending { waiting, kept, .. } => {
                waiting.is_none() && (is_stuck || kept.is_none())
            }
            _ => false,
        }
    }

    /// Whether the machine was stopped and nothing is left to be done.
    pub fn is_over(&self) -> bool {
        self.stopping && self.phase == Phase::Idle
    }

    /// What it is at, in a word.
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Idle => "idle",
            Phase::Freezing { .. } => "freezing",
            Phase::Frozen { .. } => "frozen",
            Phase::Thawing { .. } => "thawing",
            Phase::Rehearsing { .. } => "rehearsing",
            Phase::Ending { .. } => "ending",
            Phase::Releasing(_) => "releasing",
        }
    }

    /// When [`Backup::time`] is to be called at the latest.
    pub fn next(&self) -> Option<Instant> {
        match self.phase {
            Phase::Freezing { give_up, .. } | Phase::Releasing(Some(Waiter { give_up, .. })) => {
                Some(give_up)
            }
            Phase::Ending { waiting, kept, .. } => {
                let patience = waiting.map(|it| it.patience);
                patience.into_iter().chain(kept).min()
            }
            Phase::Thawing { kept, .. } => kept,
            Phase::Frozen { until, .. } | Phase::Rehearsing { until, .. } => Some(until),
            Phase::Idle | Phase::Releasing(None) => None,
        }
    }

    /// What the host asks.
    pub fn request(&mut self, now: Instant, request: Request, effects: &mut impl Effects) {
        self.withdraw(now, effects);
        match request.operation {
            op::FREEZE => self.freeze(now, request, effects),
            op::THAW => self.thaw(now, request, effects),
            other => {
                effects.answer(&request, status::OK);
                effects.say(
                    Level::Info,
                    format!("{} from the host, acknowledged", name_of(other)),
                );
                if other == op::HOT_BACKUP && self.is_idle() {
                    // The host asks whether it could take a backup, so it may take one soon.
                    effects.prepare();
                }
            }
        }
    }

    /// A request has come, so the one that is open has ended without us.
    fn withdraw(&mut self, now: Instant, effects: &mut impl Effects) {
        let (why, verdict, kept) = match &mut self.phase {
            Phase::Freezing { .. } => {
                let why = "the host did not wait for the freeze";
                (why, Verdict::Failed, Some(now + KEEP))
            }
            Phase::Thawing { kept, .. } => {
                let why = "the host did not wait for the thaw";
                (why, Verdict::Broken, *kept)
            }
            Phase::Ending { waiting, .. } if waiting.is_some() => {
                *waiting = None;
                let text = "the host did not wait for the end of the last backup";
                return effects.say(Level::Error, text.into());
            }
            Phase::Releasing(waiting) if waiting.is_some() => {
                *waiting = None;
                let text = "the host did not wait for the hooks of the last backup";
                return effects.say(Level::Error, text.into());
            }
            Phase::Idle
            | Phase::Frozen { .. }
            | Phase::Rehearsing { .. }
            | Phase::Ending { .. }
            | Phase::Releasing(_) => return,
        };
        effects.call_off();
        effects.say(Level::Error, format!("{why}; called off"));
        self.phase = Phase::Ending {
            whose: Whose::Host,
            verdict,
            waiting: None,
            kept,
        };
        self.set_broken(why.into(), true, effects);
    }

    fn freeze(&mut self, now: Instant, request: Request, effects: &mut impl Effects) {
        if matches!(self.phase, Phase::Frozen { .. }) && !effects.covers(&request) {
            // Then it is frozen anew, with what is missing.
            let broken = Break {
                why: "the host has begun another backup".into(),
                reason: Some(thawed::CALLED_OFF),
            };
            self.end_early(now, broken, effects);
        }
        // The host's comes first, and is one of its own.
        self.end_rehearsal(now, "the host has begun a backup", false, effects);
        let patience = request.time_left.max(MARGIN * 2) - MARGIN;
        let give_up = now + patience;
        let waiter = Waiter {
            request,
            patience: give_up.min(now + LAST),
            give_up,
        };
        let refused = match &mut self.phase {
            _ if self.stopping => "the daemon is being stopped",
            Phase::Idle => return self.begin(request, give_up, effects),
            Phase::Ending { waiting, .. } => {
                *waiting = Some(waiter);
                let text = "FREEZE from the host waits for the end of the last one";
                return effects.say(Level::Info, text.into());
            }
            Phase::Releasing(waiting) => {
                *waiting = Some(waiter);
                let text = "FREEZE from the host waits for the hooks of the last backup";
                return effects.say(Level::Info, text.into());
            }
            Phase::Frozen { ids, .. } => {
                *ids = *ids.start()..=request.id;
                effects.answer(&request, status::OK);
                let text = "FREEZE from the host, although frozen already";
                return effects.say(Level::Warning, text.into());
            }
            // The one that was open is withdrawn by then.
            Phase::Freezing { .. } | Phase::Thawing { .. } | Phase::Rehearsing { .. } => {
                "the last one has not ended"
            }
        };
        refuse(&request, refused, effects);
    }

    fn begin(&mut self, request: Request, give_up: Instant, effects: &mut impl Effects) {
        if let Err(why) = effects.begin(&request, describe(&request)) {
            return refuse(&request, &why, effects);
        }
        self.spent = false;
        let broken = self.broken.take();
        let was_told = std::mem::take(&mut self.told);
        match broken {
            Some(_) if was_told => effects.remember(None),
            // The word stays until this one is good.
            Some(why) => self.untold = Some(why),
            None => {}
        }
        self.phase = Phase::Freezing { request, give_up };
    }

    /// Somebody rehearses. The host knows nothing of it, and what it asks comes first.
    pub fn rehearse(
        &mut self,
        now: Instant,
        rehearsal: Rehearsal,
        effects: &mut impl Effects,
    ) -> Result<(), NoRehearsal> {
        let Rehearsal { time, with_hooks } = rehearsal;
        if self.stopping {
            return Err(NoRehearsal::Busy("the daemon is being stopped"));
        }
        if self.phase != Phase::Idle {
            return Err(NoRehearsal::Busy(
                "a backup or another rehearsal is under way",
            ));
        }
        lasts(time, self.deadline).map_err(NoRehearsal::Failed)?;
        let seconds = time.as_secs_f64();
        let text = format!("a rehearsal, to stay frozen for {seconds:.1} s");
        let begun = effects.rehearse(with_hooks, text);
        begun.map_err(NoRehearsal::Failed)?;
        self.phase = Phase::Rehearsing {
            time: Some(time),
            until: now + MAKE,
        };
        Ok(())
    }

    /// Whoever has asked for the rehearsal does not wait for it any longer.
    pub fn nobody_rehearses(&mut self, now: Instant, effects: &mut impl Effects) {
        self.end_rehearsal(now, "whoever asked for it has gone", true, effects);
    }

    /// Ends a rehearsal, if one is under way, and in order; whether it is good if all was frozen.
    fn end_rehearsal(
        &mut self,
        now: Instant,
        why: &'static str,
        is_good: bool,
        effects: &mut impl Effects,
    ) {
        let Phase::Rehearsing { time, .. } = self.phase else {
            return;
        };
        if time.is_some() {
            return self.break_rehearsal(now, why.into(), effects);
        }
        effects.thaw(now + KEEP);
        effects.say(Level::Info, format!("the rehearsal ends: {why}"));
        let (verdict, fault) = match is_good {
            true => (Verdict::Good, None),
            false => (Verdict::Broken, Some(why.into())),
        };
        self.phase = Phase::Ending {
            whose: Whose::Nobody(fault),
            verdict,
            waiting: None,
            kept: Some(now + KEEP),
        };
    }

    /// Calls off one that is under way.
    fn break_rehearsal(
        &mut self,
        now: Instant,
        why: Cow<'static, str>,
        effects: &mut impl Effects,
    ) {
        effects.call_off();
        let text = format!("the rehearsal is called off: {why}");
        effects.say(Level::Error, text);
        let verdict = match self.is_freezing() {
            true => Verdict::Failed,
            false => Verdict::Broken,
        };
        self.phase = Phase::Ending {
            whose: Whose::Nobody(Some(why)),
            verdict,
            waiting: None,
            kept: Some(now + KEEP),
        };
    }

    /// The hooks are ready for the freeze, or one that is required is not.
    pub fn quiesced(
        &mut self,
        now: Instant,
        result: Result<(), String>,
        effects: &mut impl Effects,
    ) {
        if !self.is_freezing() {
            // It was called off meanwhile.
            return;
        }
        match (result, &self.phase) {
            (Ok(()), _) => effects.go_on(),
            (Err(why), Phase::Freezing { request, .. }) => {
                let request = *request;
                effects.call_off();
                effects.answer(&request, status::FAIL);
                effects.say(Level::Error, format!("FREEZE fails: {why}"));
                self.phase = called_off(now, Verdict::Failed);
                self.set_broken(why.into(), true, effects);
            }
            (Err(why), _) => self.break_rehearsal(now, why.into(), effects),
        }
    }

    /// All hooks have been let go.
    pub fn released(&mut self, effects: &mut impl Effects) {
        let waiting = match self.phase {
            Phase::Releasing(waiting) => waiting,
            // What hangs has yet to end.
            Phase::Thawing { kept: None, .. } | Phase::Ending { kept: None, .. } => return,
            _ => return effects.say(Level::Warning, "an outcome of no hooks".into()),
        };
        self.phase = Phase::Idle;
        if let Some(it) = waiting {
            self.begin(it.request, it.give_up, effects);
        }
    }

    fn thaw(&mut self, now: Instant, request: Request, effects: &mut impl Effects) {
        if let Phase::Frozen { ids, .. } = &self.phase {
            let ids = ids.clone();
            effects.thaw(now + request.time_left.max(MARGIN * 2) - MARGIN);
            effects.say(Level::Info, describe(&request));
            let kept = Some(now + KEEP);
            self.phase = Phase::Thawing { ids, request, kept };
            return;
        }
        // The module lets go of what it holds for nobody once this is answered, and a v1 kernel may want to sleep.
        self.end_rehearsal(now, "the host has said THAW", false, effects);
        // A v1 kernel has a daemon thaw before the machine sleeps with a THAW that looks like the host's.
        // The host's own is still to come then, and it is not what ended the freeze.
        let is_second = (self.spent && request.id == 0)
            .then_some(Cow::Borrowed("the freeze has ended with the THAW before"));
        match self.broken.as_ref().or(is_second.as_ref()) {
            Some(why) => {
                let text = format!("THAW from the host fails: {why}, so the backup is not good");
                effects.answer(&request, status::FAIL);
                effects.say(Level::Error, text);
                self.told = true;
            }
            None => {
                effects.answer(&request, status::OK);
                let text = "THAW from the host, but nothing is frozen";
                effects.say(Level::Info, text.into());
            }
        }
    }

    /// The freeze has ended, with what is frozen or with the reason why nothing is.
    pub fn frozen(
        &mut self,
        now: Instant,
        result: Result<Begun, String>,
        effects: &mut impl Effects,
    ) {
        match (std::mem::replace(&mut self.phase, Phase::Idle), result) {
            (Phase::Freezing { request, .. }, Ok(begun)) => {
                let counts = begun.counts;
                if effects.answer(&request, status::OK) {
                    effects.settle();
                    if self.untold.take().is_some() {
                        effects.remember(None);
                    }
                    effects.say(Level::Info, format!("FREEZE answered: {counts}"));
                    self.phase = Phase::Frozen {
                        ids: request.id..=request.id,
                        until: begun.since + self.deadline + SLACK,
                    };
                } else {
                    // The host was told that it failed, so it will not say THAW.
                    effects.call_off();
                    let text = format!("FREEZE came too late ({counts}); thawing");
                    effects.say(Level::Error, text);
                    self.phase = called_off(now, Verdict::Failed);
                    self.set_broken("the freeze came too late".into(), true, effects);
                }
            }
            (Phase::Freezing { request, .. }, Err(why)) => {
                effects.answer(&request, status::FAIL);
                let text = format!("FREEZE fails, nothing is left frozen: {why}");
                effects.say(Level::Error, text);
                self.over(Verdict::Failed, Some(why.into()), None, effects);
            }
            (
                Phase::Rehearsing {
                    time: Some(time), ..
                },
                Ok(begun),
            ) => {
                effects.settle();
                let text = format!("all is frozen for the rehearsal: {}", begun.counts);
                effects.say(Level::Info, text);
                self.phase = Phase::Rehearsing {
                    time: None,
                    until: now + time,
                };
            }
            (Phase::Rehearsing { .. }, Err(why)) => {
                let text = format!("the rehearsal fails, nothing is left frozen: {why}");
                effects.say(Level::Error, text);
                self.over(Verdict::Failed, Some(why.into()), None, effects);
            }
            // It got through just before it was called off: its thaw has yet to end.
            (phase @ Phase::Ending { .. }, Ok(_)) => self.phase = phase,
            (
                Phase::Ending {
                    whose,
                    verdict,
                    waiting,
                    ..
                },
                Err(_),
            ) => self.end(whose, verdict, waiting, effects),
            (phase, _) => {
                self.phase = phase;
                effects.say(Level::Warning, "an outcome of no freeze".into());
            }
        }
    }

    /// The thaw has ended, and with it the job. An error says why the freeze was not a good one.
    pub fn thawed(&mut self, result: Result<(), String>, effects: &mut impl Effects) {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Thawing { request, .. } => {
                let good = result.is_ok() && self.broken.is_none();
                let answer = if good { status::OK } else { status::FAIL };
                let taken = effects.answer(&request, answer);
                if let Err(why) = result {
                    effects.say(Level::Error, format!("THAW fails: {why}"));
                    self.set_broken(why.into(), true, effects);
                }
                let (level, text) = match (good, taken) {
                    (true, true) => (
                        Level::Info,
                        "THAW answered: all that was frozen is thawed, the backup is good",
                    ),
                    (false, _) => (
                        Level::Error,
                        "THAW answered with failure: the backup is not good",
                    ),
                    (true, false) => (
                        Level::Error,
                        "all that was frozen is thawed, but the answer to THAW came too late: \
                         for the host the backup has failed",
                    ),
                };
                effects.say(level, text.into());
                self.spent = true;
                // Then the kernel has given one.
                if good && !taken {
                    let why = "the answer to its THAW came too late";
                    self.set_broken(why.into(), true, effects);
                }
                // One that went with its device nobody has heard.
                if taken {
                    self.told = self.broken.is_some();
                }
                let verdict = match good && taken {
                    true => Verdict::Good,
                    false => Verdict::Broken,
                };
                let why = self.broken.clone();
                self.over(verdict, why, None, effects);
            }
            Phase::Ending {
                whose,
                verdict,
                waiting,
                ..
            } => match (whose, result) {
                (Whose::Nobody(None), Err(why)) => {
                    let whose = Whose::Nobody(Some(why.into()));
                    self.end(whose, Verdict::Broken, waiting, effects);
                }
                (whose, _) => self.end(whose, verdict, waiting, effects),
            },
            phase => {
                self.phase = phase;
                effects.say(Level::Warning, "an outcome of no thaw".into());
            }
        }
    }

    fn end(
        &mut self,
        whose: Whose,
        verdict: Verdict,
        waiting: Waiting,
        effects: &mut impl Effects,
    ) {
        let (what, why) = match whose {
            Whose::Host => ("freeze that was called off", self.broken.clone()),
            Whose::Nobody(why) => ("rehearsal", why),
        };
        let text = format!("the {what} has ended, nothing is left frozen");
        effects.say(Level::Info, text);
        self.over(verdict, why, waiting, effects);
    }

    fn over(
        &mut self,
        verdict: Verdict,
        why: Option<Cow<'static, str>>,
        waiting: Waiting,
        effects: &mut impl Effects,
    ) {
        effects.finish(verdict, why.as_deref());
        if self.broken.is_none() {
            self.broken = self.untold.take();
        }
        if effects.release(Some(verdict)) {
            self.phase = Phase::Releasing(waiting);
        } else if let Some(it) = waiting {
            self.begin(it.request, it.give_up, effects);
        }
    }

    /// The kernel says that it has thawed what it held for request `id`, and why: one of `hv_vss_uapi::thawed`, and that
    /// in words. It has the THAW that the host had sent before read before.
    pub fn notice(
        &mut self,
        now: Instant,
        id: u64,
        (reason, why): (u32, &'static str),
        effects: &mut impl Effects,
    ) {
        let is_ours = match &self.phase {
            Phase::Freezing { request, .. } => id == request.id,
            Phase::Frozen { ids, .. } | Phase::Thawing { ids, .. } => ids.contains(&id),
            Phase::Rehearsing { .. } => id == 0,
            // What was called off, it has heard from us.
            Phase::Idle | Phase::Ending { .. } | Phase::Releasing(_) => false,
        };
        if !is_ours {
            return;
        }
        if matches!(self.phase, Phase::Thawing { .. }) && only_thaws(reason) {
            let text = format!("{why}; the host had said so before, and it breaks nothing");
            return effects.say(Level::Info, text);
        }
        let why = Cow::Borrowed(why);
        self.end_early(now, Break { why, reason: None }, effects);
    }

    /// Something has happened that ends whatever freeze is under way or in force.
    pub fn end_early(&mut self, now: Instant, broken: Break, effects: &mut impl Effects) {
        let Break { why, reason } = broken;
        let is_asked = matches!(self.phase, Phase::Freezing { .. });
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => return,
            Phase::Freezing { request, .. } => {
                effects.call_off();
                effects.answer(&request, status::FAIL);
                let text = format!("FREEZE fails, it is called off: {why}");
                effects.say(Level::Error, text);
                self.phase = called_off(now, Verdict::Failed);
            }
            Phase::Frozen { ids, .. } => {
                if let Some(reason) = reason {
                    effects.tell_thawed(*ids.end(), reason);
                }
                effects.call_off();
                let text = format!("{why}: thawing before the host said so");
                effects.say(Level::Error, text);
                self.phase = called_off(now, Verdict::Broken);
            }
            // All stood still until the host had its copies, and is about to be thawed anyway. What somebody has
            // thawed before shows itself then.
            phase @ Phase::Thawing { .. } if reason.is_some_and(only_thaws) => {
                self.phase = phase;
                return;
            }
            phase @ Phase::Rehearsing { .. } => {
                self.phase = phase;
                return self.break_rehearsal(now, why, effects);
            }
            // The thaw is on its way; only its success is no longer worth anything.
            phase @ Phase::Thawing { .. } => {
                effects.call_off();
                self.phase = phase;
            }
            // That has been ended before, and the next one has nothing to do with it.
            phase @ (Phase::Ending { .. } | Phase::Releasing(_)) => {
                self.phase = phase;
                if reason == Some(thawed::OPERATOR) {
                    self.refuse_waiting(&why, effects);
                }
                return;
            }
        }
        self.set_broken(why, is_asked, effects);
    }

    /// What the host has asked went with its device.
    pub fn device_lost(&mut self, now: Instant, effects: &mut impl Effects) {
        let why = "the device went away";
        self.refuse_waiting(why, effects);
        let (why, reason) = (why.into(), None);
        self.end_early(now, Break { why, reason }, effects);
    }

    fn refuse_waiting(&mut self, why: &str, effects: &mut impl Effects) {
        let (Phase::Ending { waiting, .. } | Phase::Releasing(waiting)) = &mut self.phase else {
            return;
        };
        if let Some(it) = waiting.take() {
            refuse(&it.request, why, effects);
        }
    }

    /// So much time has passed.
    pub fn time(&mut self, now: Instant, effects: &mut impl Effects) {
        if self.next().is_none_or(|at| now < at) {
            return;
        }
        let why = match &mut self.phase {
            Phase::Ending {
                verdict,
                waiting,
                kept,
                ..
            } => {
                if kept.take_if(|at| *at <= now).is_some() {
                    // A rehearsal may be good yet.
                    let verdict = Some(*verdict).filter(|it| *it != Verdict::Good);
                    let_go_beside_what_hangs(verdict, effects);
                }
                if waiting.is_some_and(|it| it.patience <= now) {
                    self.refuse_waiting("the last one has not ended in time", effects);
                }
                return;
            }
            Phase::Thawing { kept, .. } => {
                *kept = None;
                // It may be good yet, if the host waits for as long.
                let verdict = self.broken.as_ref().map(|_| Verdict::Broken);
                return let_go_beside_what_hangs(verdict, effects);
            }
            Phase::Releasing(_) => {
                let why = "the hooks of the last backup have not ended in time";
                return self.refuse_waiting(why, effects);
            }
            Phase::Rehearsing { time, .. } => {
                let why = match time {
                    Some(_) => "it takes too long to freeze",
                    None => "its time is over",
                };
                return self.end_rehearsal(now, why, true, effects);
            }
            Phase::Freezing { .. } => "the host would not wait any longer",
            _ => "the deadline passed, and whoever was to thaw then has not",
        };
        let reason = Some(thawed::DEADLINE);
        let why = Cow::Borrowed(why);
        self.end_early(now, Break { why, reason }, effects);
    }

    /// No further freeze; [`Backup::is_over`] says when all is thawed.
    pub fn stop(&mut self, now: Instant, effects: &mut impl Effects) {
        self.stopping = true;
        let why = "the daemon was stopped";
        self.refuse_waiting(why, effects);
        let broken = Break {
            why: why.into(),
            reason: Some(thawed::OPERATOR),
        };
        self.end_early(now, broken, effects);
    }

    /// The first reason counts; the others follow from it. Whether the host hears of it by what it has asked.
    fn set_broken(&mut self, why: Cow<'static, str>, heard: bool, effects: &mut impl Effects) {
        if self.broken.is_none() {
            self.told = heard && self.untold.take().is_none();
            effects.remember(Some(&why));
            self.broken = Some(why);
        }
    }
}

/// Whether what happens then is a thaw, as by THAW itself: the deadline has passed, an operator wants it, whoever
/// minds the freeze has died, or the machine is about to sleep.
fn only_thaws(reason: u32) -> bool {
    matches!(
        reason,
        thawed::DEADLINE | thawed::OPERATOR | thawed::CRASH | thawed::SLEEP
    )
}

/// The phase of a job that was called off just now.
fn called_off(now: Instant, verdict: Verdict) -> Phase {
    Phase::Ending {
        whose: Whose::Host,
        verdict,
        waiting: None,
        kept: Some(now + KEEP),
    }
}

/// Whether a rehearsal of that length can last, or why not: at the deadline whoever minds what is frozen thaws.
pub fn lasts(time: Duration, deadline: Duration) -> Result<(), String> {
    match time < deadline {
        true => Ok(()),
        false => Err(format!(
            "a rehearsal is to be shorter than the deadline, after which all is thawed ({} s)",
            deadline.as_secs()
        )),
    }
}

fn let_go_beside_what_hangs(verdict: Option<Verdict>, effects: &mut impl Effects) {
    if effects.release(verdict) {
        let text = "not all has ended, and what has not hangs: hooks are let go without it";
        effects.say(Level::Warning, text.into());
    }
}

fn refuse(request: &Request, why: &str, effects: &mut impl Effects) {
    effects.answer(request, status::FAIL);
    let text = format!("FREEZE from the host is refused: {why}");
    effects.say(Level::Error, text);
    effects.refused(request, why);
}

fn describe(request: &Request) -> String {
    let mut text = format!("{} from the host", name_of(request.operation));
    if request.id != 0 {
        text.push_str(&format!(", request {}", request.id));
    }
    if let Some(about) = request.about {
        text.push_str(&format!(", {}", words_about(about)));
    }
    let seconds = request.time_left.as_secs_f64();
    text.push_str(&format!(", to be answered within {seconds:.1} s"));
    text
}

fn words_about(about: About) -> String {
    let About {
        luns,
        backup_type,
        flags,
    } = about;
    let kind = match backup_type {
        UNDEFINED => "a backup".into(),
        FULL | COPY => format!("a {} backup", name_of_type(backup_type)),
        other => format!("a backup of type {other}"),
    };
    let disks = match luns {
        1 => "1 disk".into(),
        other => format!("{other} disks"),
    };
    let bit = |bit, words: &'static str| (flags & bit != 0).then(|| words.to_owned());
    let others = flags & !(AUTO_RECOVERY | SHARED_DISKS);
    let flags = [
        bit(AUTO_RECOVERY, "with auto-recovery"),
        bit(SHARED_DISKS, "shared disks among them"),
        (others != 0).then(|| format!("flags {others:#x}")),
    ];
    let parts = [Some(format!("{kind} of {disks}"))]
        .into_iter()
        .chain(flags);
    parts.flatten().collect::<Vec<_>>().join(", ")
}

// Of Msvm_VirtualSystemSnapshotSettingData, whose GuestBackupType has the same words; the message itself
// is not documented.
const UNDEFINED: u32 = 0;
const FULL: u32 = 1;
const COPY: u32 = 2;

// IC_VSS_FREEZE_FLAGS, which a host's own symbols name.
const AUTO_RECOVERY: u32 = 1;
const SHARED_DISKS: u32 = 2;

/// What the host's types of backup are called; its number for one that is not known.
pub fn name_of_type(backup_type: u32) -> Cow<'static, str> {
    match backup_type {
        FULL => "full".into(),
        COPY => "copy".into(),
        other => other.to_string().into(),
    }
}

/// What the host's operations are called.
pub fn name_of(operation: u8) -> Cow<'static, str> {
    Cow::Borrowed(match operation {
        op::CREATE => "CREATE",
        op::DELETE => "DELETE",
        op::HOT_BACKUP => "HOT_BACKUP",
        op::GET_DM_INFO => "GET_DM_INFO",
        op::BU_COMPLETE => "BU_COMPLETE",
        op::FREEZE => "FREEZE",
        op::THAW => "THAW",
        op::AUTO_RECOVER => "AUTO_RECOVER",
        other => return format!("operation {other}").into(),
    })
}

#[cfg(test)]
mod tests;
