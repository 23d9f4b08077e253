// The HTTP API of `polyturn view`, as types. `viewer/` answers in these shapes; the page asks through `requestKey`.
//
// All requests are GET (but `playOn`, which is there only where a policy is served). Names, ids and texts are whatever
// a model or an environment wrote: show them as text, never as HTML. Control characters, bidirectional marks and
// very long lines are left in; `cut` says how many characters of a text were left out. A number that is not finite
// is null. An answer has an ETag: ask with If-None-Match (the browser does), 304 says that nothing has changed.
//
// An error is `{error: string}`, a sentence for people, with status 400 (a parameter), 404 (no such thing) or 409.

/** By kind of request: its path, its parameters and what it answers. */
export interface Requests {
  "/api/runs": { parameters: Record<string, never>; answer: Runs };
  "/api/run": { parameters: { run: string }; answer: RunDetail };
  /** Curves of several runs: `run` and `name` are given once for each. Without `name`: the headline ones. */
  "/api/metrics": { parameters: { run: string[]; name?: string[]; points?: number }; answer: Metrics };
  /** `set`: a name of `RunSummary.sets`; without it the first one. */
  "/api/steps": { parameters: { run: string; set?: string }; answer: Steps };
  /** Histogram of rewards and what else sums up one step (of an evaluation: one entry, whose step is 0). */
  "/api/step": { parameters: { run: string; set?: string; step: number; bins?: number }; answer: StepDetail };
  "/api/episodes": { parameters: EpisodeFilter; answer: EpisodePage };
  /** The episodes of one task that share a baseline, side by side. */
  "/api/group": { parameters: { run: string; set?: string; step?: number; group: string }; answer: GroupDetail };
  "/api/episode": { parameters: EpisodeKey; answer: EpisodeDetail };
  /** Tokens `start` to `start + count` of a segment; count is at most 20,000 (default 2,000). */
  "/api/tokens": {
    parameters: EpisodeKey & { segment?: number; start?: number; count?: number };
    answer: Tokens;
  };
  /** |trainer - engine| logprob by position in the segment and step; the last `last` steps that were kept. */
  "/api/mismatch": { parameters: { run: string; last?: number }; answer: MismatchMap };
  /** Of an evaluation (`kind: "evaluation"`): what `polyturn eval report` says, as it goes to JSON. */
  "/api/report": { parameters: { run: string }; answer: EvaluationReport };
  /** Two evaluations, as `polyturn eval compare A B` compares them. */
  "/api/compare": { parameters: { a: string; b: string }; answer: EvaluationComparison };
  /** For polling (every two seconds or so): what has changed since a cursor that an earlier answer gave. */
  "/api/live": { parameters: { cursor?: string }; answer: Live };
  /** How far a turn that is played on has come. */
  "/api/played": { parameters: { id: string }; answer: Played };
}

export type RequestPath = keyof Requests;
type Value = string | number | boolean | undefined;

/** The URL of a request, parameters in the order of the alphabet; an exported file has its answers under these. */
export function requestKey(path: RequestPath, parameters: object = {}): string {
  const pairs: [string, string][] = [];
  for (const name of Object.keys(parameters).sort()) {
    const value = (parameters as Record<string, Value | Value[]>)[name];
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined) pairs.push([name, String(one)]);
    }
  }
  const query = pairs.map(([name, value]) => `${encodeURIComponent(name)}=${encodeURIComponent(value)}`).join("&");
  return query ? `${path}?${query}` : path;
}

/** In an exported file: the text of `<script type="application/json" id="polyturn-data">`. The page asks it, not HTTP.
 *
 * In `answers` are, by `requestKey` with exactly these parameters: `/api/runs`; of each run `/api/run?run`,
 * `/api/metrics?run` with the curves of all names, `/api/steps?run&set`, `/api/step?run&set&step`,
 * `/api/mismatch?run`, `/api/report?run`, `/api/compare?a&b`; `/api/episodes?run&set` with all exported rows (filter
 * and sort them in the page); and of each exported episode `/api/group?group&run&set&step`,
 * `/api/episode?id&run&set&step` and `/api/tokens?id&run&segment&set&step` (all tokens of the segment). */
export interface Embedded {
  format: 1;
  /** Sentences on what was left out to keep the file small. */
  left_out: string[];
  answers: Record<string, unknown>;
}

// ---------------------------------------------------------------------------------------------------- runs

export interface Runs {
  runs: RunSummary[];
  /** Directories that were named, or looked like runs, and cannot be read: a sentence for each. */
  problems: string[];
  /** The policy that plays turns on; null: none was given. */
  policy: { label: string; token: string } | null;
  version: string;
}

export type RunKind = "training" | "rollout" | "evaluation";
/** `stopped`: nothing has been written for some minutes and there is no summary: killed, or waiting for long. */
export type RunState = "running" | "finished" | "interrupted" | "failed" | "stopped";

export interface RunSummary {
  /** For requests and permalinks. */
  id: string;
  name: string;
  path: string;
  kind: RunKind;
  state: RunState;
  /** Why it failed or stopped, in a sentence. */
  reason: string | null;
  /** Finished steps, and those that the config asks for. */
  step: number | null;
  num_steps: number | null;
  /** Seconds since 1970. */
  started: number | null;
  updated: number | null;
  environments: string[];
  /** The model, or who played. */
  policy: string | null;
  /** A few figures for the list, such as `reward/mean` of the last step, or `score`, `coverage` of an evaluation. */
  headline: Record<string, number | null>;
  /** Of the newest step; those that lasted and are over have `until`. */
  alarms: Alarm[];
  sets: EpisodeSet[];
}

/** Episodes that are listed together: those of the steps (`train`), one held-out evaluation, or one entry of a suite. */
export interface EpisodeSet {
  name: string;
  title: string;
  kind: "train" | "heldout" | "entry";
  /** Steps that have episodes, in order; [0] where there are none. */
  steps: number[];
}

export interface Alarm {
  name: string;
  sentence: string;
  /** The first step with it, and the last; null: it lasts. */
  since: number;
  until: number | null;
}

export interface RunDetail {
  summary: RunSummary;
  /** The resolved config (of an evaluation its `evaluation.yaml`), as YAML. */
  config: string | null;
  /** All alarms of the run, the newest first. */
  alarms: Alarm[];
  /** Held-out evaluations of a run of training. */
  evaluations: HeldOutResult[];
  /** Where the seconds went, by phase. */
  seconds: Record<string, number | null>;
  versions: Record<string, string>;
  /** Sentences on what is damaged or missing in its files. */
  problems: string[];
}

export interface HeldOutResult {
  suite: string;
  /** `before`, `after`, or the step. */
  when: string;
  step: number | null;
  mean: number | null;
  low: number | null;
  high: number | null;
  num_tasks: number | null;
  /** Its episodes; null where none were kept. */
  set: string | null;
}

// ------------------------------------------------------------------------------------------------- metrics

export interface Metrics {
  /** Every name that a row of any of the runs has, sorted. */
  names: string[];
  /** Those to show first, and the charts that they stand in. */
  headline: string[];
  overview: { title: string; names: string[]; better: string | null }[];
  /** What the names of the curves mean, where that is known. `low` to `high` is healthy; `otherwise` says what to do. */
  about: Record<
    string,
    { unit: string; meaning: string; low: number | null; high: number | null; otherwise: string | null }
  >;
  curves: Curve[];
  problems: string[];
}

/** At most `points` (default 1,000) points: each stands for a stretch of steps; low and high are over the stretch. */
export interface Curve {
  run: string;
  name: string;
  /** The last step of each stretch. */
  steps: number[];
  values: (number | null)[];
  /** Null where each stretch is one step. */
  low: (number | null)[] | null;
  high: (number | null)[] | null;
}

// --------------------------------------------------------------------------------------------------- steps

export interface Steps {
  set: string;
  steps: StepSummary[];
}

export interface StepSummary {
  step: number;
  num_episodes: number;
  num_groups: number;
  reward_mean: number | null;
  reward_low: number | null;
  reward_high: number | null;
  /** Groups whose rewards are all alike: nothing is learnt from them. */
  num_uniform_groups: number;
  outcomes: Partial<Record<Outcome, number>>;
  num_tool_errors: number;
  num_turns_mean: number | null;
  alarms: string[];
  /** Whether it is under way: its episodes are in the journal, and more may come. */
  is_live: boolean;
}

export interface StepDetail {
  summary: StepSummary;
  histogram: Histogram;
  /** By reason: episodes and groups that no step was trained on, as far as they are kept. */
  dropped: Record<string, number>;
  /** The row of metrics.jsonl. */
  metrics: Record<string, number | null>;
  problems: string[];
}

export interface Histogram {
  /** One more than `counts`; the last bin includes its upper edge. Empty where nothing has a reward. */
  edges: number[];
  counts: number[];
  /** Episodes without a reward. */
  num_without: number;
}

// ------------------------------------------------------------------------------------------------ episodes

export type Outcome = "completed" | "truncated" | "failed";

export interface EpisodeFilter {
  run: string;
  set?: string;
  step?: number;
  /** First and last step, instead of `step`. */
  from_step?: number;
  to_step?: number;
  min_reward?: number;
  max_reward?: number;
  outcome?: Outcome;
  stop_reason?: string;
  /** Whether a tool call went wrong. */
  tool_error?: boolean;
  /** In any message, whatever the case. Reads all messages: slower. */
  text?: string;
  environment?: string;
  task?: string;
  group?: string;
  /** A token of this policy version is in it. */
  version?: number;
  /** Only those that no step was trained on, or only the others. */
  dropped?: boolean;
  /** A column of `EpisodePage.columns`, with `-` before it for the largest first. Default: as they were written. */
  sort?: string;
  offset?: number;
  /** At most 1,000 (default 100). */
  limit?: number;
}

export interface EpisodePage {
  /** What the rows have, with what to call it: those of `EpisodeRow`, and `metrics.NAME`, `reward_parts.NAME`. */
  columns: Column[];
  rows: EpisodeRow[];
  /** Episodes that pass the filter, and those that it was applied to. */
  num_matching: number;
  num_all: number;
  /** Of those that pass the filter. */
  histogram: Histogram;
  problems: string[];
}

export interface Column {
  name: string;
  title: string;
  kind: "number" | "text" | "seconds";
  /** Whether to show it unless somebody hides it. */
  is_shown: boolean;
}

/** What names an episode in requests and permalinks; `step` may be left out (slower). */
export interface EpisodeKey {
  run: string;
  set?: string;
  step?: number;
  id: string;
}

export interface EpisodeRow {
  set: string;
  step: number;
  episode_id: string;
  group_id: string;
  env_id: string;
  task_id: string;
  /** As text: it may be larger than a number of JavaScript. */
  seed: string;
  outcome: Outcome;
  stop_reason: string;
  /** A sentence. */
  error: string | null;
  reward: number | null;
  advantage: number | null;
  num_turns: number;
  num_tool_calls: number;
  num_tool_errors: number;
  /** Sampled by engines; 0 where nobody counted. */
  num_drawn_tokens: number;
  num_segments: number;
  generate_s: number | null;
  tools_s: number | null;
  queue_s: number | null;
  total_s: number | null;
  /** Of its sampled tokens, where they were asked for (`version`, a group, an episode); else null. */
  min_version: number | null;
  max_version: number | null;
  parent_id: string | null;
  branch_turn: number | null;
  /** Why no step was trained on it; null: one was, or it is not known yet. */
  dropped: string | null;
  metrics: Record<string, number | null>;
  reward_parts: Record<string, number | null>;
}

export interface GroupDetail {
  run: string;
  set: string;
  step: number;
  group_id: string;
  task_id: string;
  env_id: string;
  episodes: GroupMember[];
  /** Messages with which all of them begin. */
  num_common_messages: number;
  /** Tokens with which the first segments of all of them begin; null where one has none. */
  num_common_tokens: number | null;
  reward_mean: number | null;
  reward_std: number | null;
  problems: string[];
}

export interface GroupMember {
  row: EpisodeRow;
  messages: ShownMessage[];
  /** The message and the token at which it parts from the first episode of the group; null: nowhere, or the first. */
  parts_at_message: number | null;
  parts_at_token: number | null;
}

export interface EpisodeDetail {
  row: EpisodeRow;
  /** The sentence, and a traceback where there is one. */
  error: string | null;
  /** What of the environment failed it. */
  failed_part: string | null;
  messages: ShownMessage[];
  turns: Turn[];
  segments: SegmentNode[];
  tools: ToolUse[];
  role_rewards: Record<string, number | null>;
  group_reward: number | null;
  num_recovered_calls: number;
  num_lost_tokens: number;
  /** Others of its tree: the episode that it is a branch of, and those that branch from it. */
  relatives: { episode_id: string; parent_id: string | null; branch_turn: number | null; reward: number | null }[];
  /** The episodes of its group, in order, for going from one to the next. */
  siblings: string[];
  /** Why a turn cannot be played on; null: it can be (where `Runs.policy` is there). */
  not_playable: string | null;
  problems: string[];
}

export interface ShownMessage {
  index: number;
  /** The turn that it is, or that it answers; null before the first. */
  turn: number | null;
  role: "system" | "user" | "assistant" | "tool" | string;
  /** The tool, or who speaks where there are several. */
  name: string | null;
  text: string;
  cut: number;
  /** To be folded. */
  thinking: string | null;
  thinking_cut: number;
  calls: ShownCall[];
  /** Of a tool's result: the call that it answers. */
  call_id: string | null;
  /** Of a tool's result: whether the call went wrong; null: not recorded. */
  is_error: boolean | null;
  /** What an environment's renderer makes of it; the text stands beside it all the same. Empty: nothing special. */
  blocks: Block[];
}

export interface ShownCall {
  id: string;
  name: string;
  arguments: unknown;
  /** The message with its result. */
  result: number | null;
}

/** One turn. Seconds are null where the run did not record them by turn. */
export interface Turn {
  turn: number;
  role: string;
  reward: number | null;
  /** Since the episode's start. */
  start_s: number | null;
  generate_s: number | null;
  tools_s: number | null;
  queue_s: number | null;
  num_sampled: number;
  /** Tokens that stood before it. */
  num_context: number | null;
  min_version: number | null;
  max_version: number | null;
  mean_logprob: number | null;
  /** Of |trainer - engine|. */
  mean_difference: number | null;
  mean_advantage: number | null;
}

/** A linear run of tokens. Where history was rewritten, another begins that shares a prefix with an earlier one. */
export interface SegmentNode {
  segment: number;
  role: string;
  /** The earlier segment that it shares the longest prefix with; null: none. */
  parent: number | null;
  num_shared: number;
  num_tokens: number;
  num_sampled: number;
  first_turn: number | null;
  last_turn: number | null;
  advantage: number | null;
}

export interface ToolUse {
  name: string;
  num_calls: number;
  num_failures: number;
  num_timeouts: number;
  num_truncated: number;
  seconds: number | null;
  max_seconds: number | null;
  queue_s: number | null;
  cost: number | null;
}

// -------------------------------------------------------------------------------------------------- blocks

/** What a renderer of an environment makes of a message. Texts are texts, whatever stands in them. */
export type Block =
  | { kind: "text"; title: string | null; text: string }
  /** `cells[row][column]`; `marks` are cells to stand out, by what for. */
  | { kind: "board"; title: string | null; cells: string[][]; marks: { row: number; column: number; why: string }[] }
  | { kind: "passages"; title: string | null; passages: Passage[] }
  | { kind: "file"; title: string | null; path: string | null; language: string | null; text: string }
  | { kind: "diff"; title: string | null; path: string | null; text: string }
  | { kind: "table"; title: string | null; columns: string[]; rows: string[][] };

export interface Passage {
  title: string;
  text: string;
  rank: number | null;
  score: number | null;
}

// -------------------------------------------------------------------------------------------------- tokens

/** Columns of equal length, but those that are null: the run did not record them. */
export interface Tokens {
  segment: number;
  start: number;
  total: number;
  ids: number[];
  /** The text of each; "" where a character goes on in the next token. Null: no tokenizer, `tokenizer` says why. */
  texts: string[] | null;
  tokenizer: string;
  sampled: boolean[];
  turns: number[];
  /** Null where a token was not sampled; so in all that follow. */
  versions: (number | null)[];
  /** Of the engine that sampled it. */
  logprobs: (number | null)[];
  /** Of the trainer, before the step's first update. */
  trainer_logprobs: (number | null)[] | null;
  /** Trainer minus engine. */
  differences: (number | null)[] | null;
  /** exp of the difference. */
  ratios: (number | null)[] | null;
  /** What a correction weighs it by; 0: it was rejected. */
  weights: (number | null)[] | null;
  /** Whether a correction or the policy's loss bounds it before the first update. */
  clipped: (boolean | null)[] | null;
  advantages: (number | null)[] | null;
  reference_logprobs: (number | null)[] | null;
  teacher_logprobs: (number | null)[] | null;
}

export interface MismatchMap {
  steps: number[];
  /** Positions in a segment at which the rows begin. */
  positions: number[];
  /** `mean[step][position]` of |trainer - engine|; null where there is no token. */
  mean: (number | null)[][];
  max: (number | null)[][];
  num_tokens: number[][];
  /** Why it is empty. */
  reason: string | null;
}

// --------------------------------------------------------------------------------------------- evaluations

/** `rollout/evaluation/report.py:Report` as JSON. */
export type EvaluationReport = Record<string, unknown>;
/** `rollout/evaluation/compare.py:Comparison` as JSON. */
export type EvaluationComparison = Record<string, unknown>;

// -------------------------------------------------------------------------------------- live and playing on

export interface Live {
  cursor: string;
  /** Ids of runs that changed since the cursor; all of them where it is old or not given. */
  changed: string[];
  running: string[];
}

/** POST /api/play with this as JSON and the header `X-Polyturn-Token: Runs.policy.token`; answers `{id}`. */
export interface PlayOn {
  run: string;
  set: string;
  step: number;
  id: string;
  /** Turns before this one are replayed as they were; the policy takes this one and those that follow. */
  turn: number;
}

export interface Played {
  id: string;
  state: "playing" | "done" | "failed";
  /** Why it failed. */
  reason: string | null;
  reward: number | null;
  outcome: Outcome | null;
  stop_reason: string | null;
  messages: ShownMessage[];
  /** What differed from the stored episode while its turns were replayed, such as another result of a tool. */
  differences: string[];
}
