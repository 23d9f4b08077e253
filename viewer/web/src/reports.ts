/** `rollout/evaluation/report.py` and `compare.py` as they go to JSON: what of them the page shows. */

export interface Estimate {
  mean: number;
  low: number | null;
  high: number | null;
  method: string;
  num_tasks: number;
  coverage: number;
}

export interface AtK {
  k: number;
  estimate: Estimate;
}

export interface Spread {
  mean: number;
  p50: number;
  p90: number;
  p99: number;
  total: number;
}

export interface Coverage {
  num_asked: number;
  num_scored: number;
  num_infrastructure: number;
  num_scorer: number;
  num_missing: number;
  num_tasks: number;
  num_scored_tasks: number;
  share: number;
}

export interface Figures {
  coverage: Coverage;
  verdict: number | null;
  score: Estimate | null;
  bounds: [number, number] | null;
  success: Estimate | null;
  pass_at: AtK[];
  pass_all: AtK[];
  majority: AtK[];
  no_answer_share: number | null;
  truncated: Record<string, number>;
  spending: (Record<string, Spread> & { tool_error_share: number }) | null;
  cost: { total: number; num_priced: number; per_episode: number; per_success: number | null } | null;
  metrics: Record<string, number>;
  errors: Record<string, number>;
}

export interface EntryReport {
  name: string;
  environment: string;
  split: string;
  num_tasks: number;
  samples_per_task: number;
  success_score: number;
  figures: Figures;
}

export interface Report {
  suite: string;
  policy: string;
  confidence: number;
  coverage_floor: number;
  entries: EntryReport[];
  overall: Figures;
  pooled: Estimate | null;
}

export interface TaskPair {
  entry: string;
  task_id: string;
  task_digest: string;
  a: number;
  b: number;
}

export interface PairedResult {
  num_tasks: number;
  a: number;
  b: number;
  effect: number;
  low: number | null;
  high: number | null;
  p_value: number;
  p_adjusted: number;
  minimal_detectable_effect: number | null;
  verdict: "better" | "worse" | "undecided" | "none";
}

export interface EntryComparison {
  name: string;
  left_out: { only_in_a: number; only_in_b: number; unscored_in_a: number; unscored_in_b: number };
  result: PairedResult | null;
  gained: TaskPair[];
  lost: TaskPair[];
}

export interface Comparison {
  a: string;
  b: string;
  confidence: number;
  coverage_floor: number;
  warnings: string[];
  entries: EntryComparison[];
  entries_left_out: Record<string, string>;
  overall: PairedResult;
}
