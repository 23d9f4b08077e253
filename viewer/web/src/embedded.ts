/** Answers of an exported page, which has no server: what the server would filter, sort and cut is done here. */

import type {
  Curve, Embedded, EpisodeDetail, EpisodeFilter, EpisodePage, EpisodeRow, Histogram, Metrics, RequestPath, Requests, Tokens,
} from "./api";
import { requestKey } from "./api";

let embedded: Embedded | null | undefined;

export function exported(): Embedded | null {
  if (embedded === undefined) {
    const element = document.getElementById("polyturn-data");
    embedded = element ? (JSON.parse(element.textContent ?? "") as Embedded) : null;
  }
  return embedded;
}

export function answerFrom<Path extends RequestPath>(file: Embedded, path: Path, parameters: object): Requests[Path]["answer"] {
  const answer = make(file, path, parameters as Record<string, unknown>);
  if (answer === undefined) throw new Error("This is not in the exported file. `polyturn view` on the run's directory has it.");
  return answer as Requests[Path]["answer"];
}

function make(file: Embedded, path: RequestPath, parameters: Record<string, unknown>): unknown {
  if (path === "/api/live") return { cursor: "", changed: [], running: [] };
  if (path === "/api/metrics") return metrics(file, parameters.run as string[], parameters.name as string[] | undefined);
  if (path === "/api/episodes") return episodes(file, parameters as unknown as EpisodeFilter);
  if (path === "/api/tokens") return tokens(file, parameters);
  const { bins: _bins, last: _last, ...key } = parameters;
  return found(file, path, key);
}

/** The answer to just this, or to a request that says more, such as the step of an episode. */
function found(file: Embedded, path: RequestPath, parameters: Record<string, unknown>): unknown {
  const exact = file.answers[requestKey(path, parameters)];
  if (exact !== undefined) return exact;
  for (const [key, answer] of Object.entries(file.answers)) {
    const [own, query] = key.split("?");
    if (own !== path) continue;
    const values = new URLSearchParams(query);
    if (Object.entries(parameters).every(([name, value]) => value === undefined || values.get(name) === String(value))) return answer;
  }
  return undefined;
}

function metrics(file: Embedded, runs: string[], names: string[] | undefined): Metrics {
  const all: Metrics = { names: [], headline: [], overview: [], about: {}, curves: [], problems: [] };
  const curves = new Map<string, Curve>();
  for (const [key, answer] of Object.entries(file.answers)) {
    if (!key.startsWith("/api/metrics?")) continue;
    const one = answer as Metrics;
    const of = new URLSearchParams(key.slice(key.indexOf("?"))).getAll("run");
    if (!of.some((run) => runs.includes(run))) continue;
    for (const curve of one.curves) if (runs.includes(curve.run)) curves.set(`${curve.run}\n${curve.name}`, curve);
    all.names = [...new Set([...all.names, ...one.names])].sort();
    all.headline = [...new Set([...all.headline, ...one.headline])];
    all.about = { ...all.about, ...one.about };
    for (const chart of one.overview) {
      const same = all.overview.find((other) => other.title === chart.title);
      if (same) same.names = [...new Set([...same.names, ...chart.names])];
      else all.overview.push({ ...chart });
    }
  }
  const wanted = new Set(names ?? all.headline);
  all.curves = [...curves.values()].filter((curve) => wanted.has(curve.name));
  return all;
}

function tokens(file: Embedded, parameters: Record<string, unknown>): Tokens | undefined {
  const { start = 0, count = 2000, ...key } = parameters as { start?: number; count?: number };
  const whole = found(file, "/api/tokens", key) as Tokens | undefined;
  if (!whole) return undefined;
  const part: Record<string, unknown> = { ...whole, start };
  for (const [name, column] of Object.entries(whole)) if (Array.isArray(column)) part[name] = column.slice(start, start + count);
  return part as unknown as Tokens;
}

function texts(file: Embedded, row: EpisodeRow, run: string): string {
  const detail = found(file, "/api/episode", { run, set: row.set, id: row.episode_id, step: row.step }) as EpisodeDetail | undefined;
  return (detail?.messages ?? []).map((one) => `${one.text}\n${one.thinking ?? ""}\n${JSON.stringify(one.calls)}`).join("\n").toLowerCase();
}

function episodes(file: Embedded, filter: EpisodeFilter): EpisodePage | undefined {
  const whole = found(file, "/api/episodes", { run: filter.run, set: filter.set }) as EpisodePage | undefined;
  if (!whole) return undefined;
  const first = filter.step ?? filter.from_step ?? -Infinity;
  const last = filter.step ?? filter.to_step ?? Infinity;
  const inSteps = whole.rows.filter((row) => row.step >= first && row.step <= last);
  const needle = filter.text?.toLowerCase();
  const rows = inSteps.filter(
    (row) =>
      (filter.min_reward === undefined || (row.reward !== null && row.reward >= filter.min_reward)) &&
      (filter.max_reward === undefined || (row.reward !== null && row.reward <= filter.max_reward)) &&
      (filter.outcome === undefined || row.outcome === filter.outcome) &&
      (filter.stop_reason === undefined || row.stop_reason === filter.stop_reason) &&
      (filter.tool_error === undefined || row.num_tool_errors > 0 === filter.tool_error) &&
      (filter.environment === undefined || row.env_id === filter.environment) &&
      (filter.task === undefined || row.task_id === filter.task) &&
      (filter.group === undefined || row.group_id === filter.group) &&
      (filter.dropped === undefined || (row.dropped !== null) === filter.dropped) &&
      (filter.version === undefined ||
        (row.min_version !== null && row.min_version <= filter.version && filter.version <= (row.max_version ?? row.min_version))) &&
      (!needle || texts(file, row, filter.run).includes(needle)),
  );
  if (filter.sort) sortRows(rows, filter.sort);
  const offset = filter.offset ?? 0;
  return {
    ...whole,
    rows: rows.slice(offset, offset + (filter.limit ?? 100)),
    num_matching: rows.length,
    num_all: inSteps.length,
    histogram: histogramOf(rows),
  };
}

export function valueOf(row: EpisodeRow, column: string): unknown {
  if (column.startsWith("metrics.")) return row.metrics[column.slice(8)] ?? null;
  if (column.startsWith("reward_parts.")) return row.reward_parts[column.slice(13)] ?? null;
  return (row as unknown as Record<string, unknown>)[column] ?? null;
}

/** What has no value comes last, whatever the direction. */
function sortRows(rows: EpisodeRow[], sort: string): void {
  const down = sort.startsWith("-");
  const name = down ? sort.slice(1) : sort;
  const sign = down ? -1 : 1;
  rows.sort((a, b) => {
    const [x, y] = [valueOf(a, name), valueOf(b, name)];
    if (x === null || y === null) return x === y ? 0 : x === null ? 1 : -1;
    if (typeof x === "number" && typeof y === "number") return sign * (x - y);
    return sign * String(x).localeCompare(String(y));
  });
}

function histogramOf(rows: EpisodeRow[]): Histogram {
  const rewards = rows.map((row) => row.reward).filter((reward) => reward !== null);
  const num_without = rows.length - rewards.length;
  if (!rewards.length) return { edges: [], counts: [], num_without };
  let [low, high] = [Math.min(...rewards), Math.max(...rewards)];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const bins = 20;
  const counts = new Array<number>(bins).fill(0);
  for (const reward of rewards) {
    const bin = Math.min(bins - 1, Math.floor(((reward - low) / (high - low)) * bins));
    counts[bin] = (counts[bin] ?? 0) + 1;
  }
  return { edges: Array.from({ length: bins + 1 }, (_, at) => low + ((high - low) * at) / bins), counts, num_without };
}
