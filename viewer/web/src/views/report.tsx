/** The report of an evaluation, and a comparison of two. */

import type { RunSummary } from "../api";
import { useAnswer } from "../client";
import { count, number, percent, seconds } from "../format";
import { between, Interval } from "../interval";
import { Facts, Problems, Ready } from "../parts";
import type { AtK, Comparison, EntryComparison, Figures, PairedResult, Report, TaskPair } from "../reports";
import { go, link } from "../router";
import { Inline } from "../visible_text";

export function ReportView({ run }: { run: RunSummary }) {
  const asked = useAnswer("/api/report", { run: run.id });
  const others = (useAnswer("/api/runs", {}).answer?.runs ?? []).filter((one) => one.kind === "evaluation" && one.id !== run.id);
  return (
    <>
      {others.length > 0 && (
        <div class="filters">
          <label for="compare-with">Compare with</label>
          <select id="compare-with" value="" onChange={(event) => go(["compare"], { a: event.currentTarget.value, b: run.id })}>
            <option value="">another evaluation …</option>
            {others.map((one) => (
              <option key={one.id} value={one.id}>
                {one.name}
              </option>
            ))}
          </select>
        </div>
      )}
      <Ready of={asked}>{(answer) => <ReportOf run={run} report={answer as unknown as Report} />}</Ready>
    </>
  );
}

/** The set of episodes that an entry of the suite has. */
function setOf(run: RunSummary | undefined, entry: string): string | undefined {
  const set = run?.sets.find((one) => one.kind === "entry" && (one.name === entry || one.title === entry));
  return set?.name ?? run?.sets.find((one) => one.name.endsWith(entry))?.name;
}

function ReportOf({ run, report }: { run: RunSummary; report: Report }) {
  const rows: [string, Figures, string | null][] = report.entries.map((entry) => [entry.name, entry.figures, entry.environment]);
  if (report.entries.length > 1) rows.push(["all entries", report.overall, null]);
  const ends = rows.flatMap(([, figures]) => (figures.score ? [figures.score.mean, figures.score.low ?? 0, figures.score.high ?? 1] : []));
  const from = Math.min(0, ...ends);
  const to = Math.max(1, ...ends);
  const { overall } = report;
  return (
    <>
      <Facts
        facts={[
          ["suite", <Inline key="suite" text={report.suite} />],
          ["played by", <Inline key="policy" text={report.policy} limit={200} />],
          ["score", overall.verdict === null ? "no verdict" : number(overall.verdict, 3)],
          ["coverage", `${percent(overall.coverage.share)} (${number(overall.coverage.num_scored)} of ${number(overall.coverage.num_asked)})`],
        ]}
      />
      {overall.verdict === null && (
        <ul class="notes">
          <li>
            {overall.score === null
              ? "Nothing was scored."
              : `Less than ${percent(report.coverage_floor)} of what was asked for was scored: the scores are shown, but are no verdict.`}
          </li>
        </ul>
      )}
      <div class="panel scroll" tabIndex={0} role="region" aria-label="Scores">
        <table>
          <thead>
            <tr>
              <th scope="col">Entry</th>
              <th scope="col" class="numeric">Score</th>
              <th scope="col">{percent(report.confidence)} interval</th>
              <th scope="col" class="numeric" />
              <th scope="col" class="numeric">Coverage</th>
              <th scope="col" class="numeric">Infrastructure</th>
              <th scope="col" class="numeric">Scorer</th>
              <th scope="col" class="numeric">Missing</th>
            </tr>
          </thead>
          <tbody>
            {rows.map(([name, figures, environment]) => (
              <tr key={name}>
                <th scope="row">
                  {environment === null ? (
                    name
                  ) : (
                    <a href={link(["run", run.id, "episodes"], { set: setOf(run, name) })}>
                      <Inline text={name} />
                    </a>
                  )}
                </th>
                <td class="numeric">{number(figures.score?.mean, 3)}</td>
                <td class="wide">
                  {figures.score && <Interval mean={figures.score.mean} low={figures.score.low} high={figures.score.high} from={from} to={to} />}
                </td>
                <td class="numeric muted">{figures.score && between(figures.score.low, figures.score.high)}</td>
                <td class="numeric">
                  {figures.coverage.share < report.coverage_floor ? (
                    <span class="chip warn">{percent(figures.coverage.share)}</span>
                  ) : (
                    percent(figures.coverage.share)
                  )}
                </td>
                <td class="numeric">
                  {figures.coverage.num_infrastructure && environment !== null ? (
                    <a href={link(["run", run.id, "episodes"], { set: setOf(run, name), outcome: "failed" })}>{number(figures.coverage.num_infrastructure)}</a>
                  ) : (
                    number(figures.coverage.num_infrastructure)
                  )}
                </td>
                <td class="numeric">{number(figures.coverage.num_scorer)}</td>
                <td class="numeric">{number(figures.coverage.num_missing)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {rows.map(([name, figures, environment]) => (
        <EntryDetail key={name} run={run} name={name} figures={figures} environment={environment} />
      ))}
    </>
  );
}

function EntryDetail({ run, name, figures, environment }: { run: RunSummary; name: string; figures: Figures; environment: string | null }) {
  const families: [string, string, AtK[]][] = [
    ["pass@k", "at least one of k succeeds", figures.pass_at],
    ["pass^k", "all k succeed", figures.pass_all],
    ["majority@k", "the score of the answer that most of k gave", figures.majority],
  ];
  const present = families.filter(([, , list]) => list.length);
  const set = setOf(run, name);
  return (
    <section aria-label={name}>
      <h2>
        <Inline text={name} /> {environment && <span class="muted"><Inline text={environment} /></span>}
      </h2>
      <div class="two">
        {present.length > 0 && (
          <div class="panel scroll">
            <table>
              <thead>
                <tr>
                  <th scope="col">Of k samples</th>
                  <th scope="col" class="numeric">Mean</th>
                  <th scope="col" />
                  <th scope="col" class="numeric">Interval</th>
                </tr>
              </thead>
              <tbody>
                {present.flatMap(([family, says, list]) =>
                  list.map(({ k, estimate }) => (
                    <tr key={`${family}${k}`} title={says}>
                      <th scope="row">{family.replace("k", String(k))}</th>
                      <td class="numeric">{number(estimate.mean, 3)}</td>
                      <td class="wide">
                        <Interval mean={estimate.mean} low={estimate.low} high={estimate.high} from={0} to={1} />
                      </td>
                      <td class="numeric muted">{between(estimate.low, estimate.high)}</td>
                    </tr>
                  )),
                )}
              </tbody>
            </table>
          </div>
        )}
        {figures.spending && (
          <div class="panel scroll">
            <table>
              <thead>
                <tr>
                  <th scope="col">Each episode</th>
                  <th scope="col" class="numeric">Mean</th>
                  <th scope="col" class="numeric">Median</th>
                  <th scope="col" class="numeric">p90</th>
                  <th scope="col" class="numeric">p99</th>
                </tr>
              </thead>
              <tbody>
                {Object.entries(figures.spending).map(([what, spread]) =>
                  typeof spread === "number" ? null : (
                    <tr key={what}>
                      <th scope="row">{what.replace(/_s$/, "").replaceAll("_", " ")}</th>
                      {[spread.mean, spread.p50, spread.p90, spread.p99].map((value, at) => (
                        <td key={at} class="numeric">
                          {what.endsWith("_s") ? seconds(value) : number(value, 3)}
                        </td>
                      ))}
                    </tr>
                  ),
                )}
              </tbody>
            </table>
          </div>
        )}
      </div>
      <p class="legend">
        {figures.success && <span>success {percent(figures.success.mean)}</span>}
        {figures.bounds && <span title="Whatever the episodes without a score had got">score at the bounds {between(...figures.bounds)}</span>}
        {figures.no_answer_share !== null && <span>no answer {percent(figures.no_answer_share)}</span>}
        {figures.spending && <span>tool errors {percent(figures.spending.tool_error_share)} of calls</span>}
        {figures.cost && <span>cost {number(figures.cost.total, 3)}, each success {number(figures.cost.per_success, 3)}</span>}
        {Object.entries(figures.truncated).map(([limit, many]) => (
          <a key={limit} href={link(["run", run.id, "episodes"], { set, outcome: "truncated", stop: limit })}>
            {number(many)} ended by <Inline text={limit} />
          </a>
        ))}
      </p>
      {Object.keys(figures.errors).length > 0 && (
        <ul class="notes" aria-label="Errors">
          {Object.entries(figures.errors).map(([sentence, many]) => (
            <li key={sentence} class="bad">
              {number(many)} × <Inline text={sentence} limit={400} />
            </li>
          ))}
        </ul>
      )}
    </section>
  );
}

const VERDICTS: Record<PairedResult["verdict"], [string, string]> = {
  better: ["good", "B is better"],
  worse: ["bad", "B is worse"],
  undecided: ["", "undecided"],
  none: ["warn", "too little was scored"],
};

export function ComparisonView({ a, b }: { a: string; b: string }) {
  const asked = useAnswer("/api/compare", { a, b });
  const runs = useAnswer("/api/runs", {}).answer?.runs ?? [];
  const name = (id: string) => runs.find((run) => run.id === id)?.name ?? id;
  return (
    <>
      <div class="head">
        <h1>Comparison</h1>
        <span class="push">
          <a href={link(["compare"], { a: b, b: a })}>Swap</a>
        </span>
      </div>
      <Ready of={asked}>
        {(answer) => {
          const comparison = answer as unknown as Comparison;
          return (
            <>
              <Facts
                facts={[
                  ["A", <a key="a" href={link(["run", a, "report"])}><Inline text={name(a)} />, <Inline text={comparison.a} limit={120} /></a>],
                  ["B", <a key="b" href={link(["run", b, "report"])}><Inline text={name(b)} />, <Inline text={comparison.b} limit={120} /></a>],
                ]}
              />
              <Problems problems={[...comparison.warnings, ...Object.entries(comparison.entries_left_out).map(([entry, where]) => `${entry}: only in ${where}`)]} />
              <Effects comparison={comparison} />
              {comparison.entries.map((entry) => (
                <Flipped key={entry.name} entry={entry} a={runs.find((run) => run.id === a)} b={runs.find((run) => run.id === b)} />
              ))}
            </>
          );
        }}
      </Ready>
    </>
  );
}

function Effects({ comparison }: { comparison: Comparison }) {
  const rows: [string, PairedResult | null, EntryComparison | null][] = comparison.entries.map((entry) => [entry.name, entry.result, entry]);
  rows.push(["over all", comparison.overall, null]);
  const size = Math.max(0.1, ...rows.flatMap(([, result]) => (result ? [Math.abs(result.effect), Math.abs(result.low ?? 0), Math.abs(result.high ?? 0)] : [])));
  const left = (entry: EntryComparison | null) => {
    if (!entry) return "";
    const { only_in_a, only_in_b, unscored_in_a, unscored_in_b } = entry.left_out;
    const total = only_in_a + only_in_b + unscored_in_a + unscored_in_b;
    return total ? `${count(total, "task")} left out: ${only_in_a} only in A, ${only_in_b} only in B, ${unscored_in_a} unscored in A, ${unscored_in_b} in B` : "";
  };
  return (
    <div class="panel scroll" tabIndex={0} role="region" aria-label="Effects">
      <table>
        <thead>
          <tr>
            <th scope="col">Entry</th>
            <th scope="col" class="numeric">Tasks</th>
            <th scope="col" class="numeric">A</th>
            <th scope="col" class="numeric">B</th>
            <th scope="col" class="numeric">B − A</th>
            <th scope="col">{percent(comparison.confidence)} interval</th>
            <th scope="col" class="numeric" />
            <th scope="col" class="numeric" title="Two-sided; over entries after Holm">p</th>
            <th scope="col" class="numeric" title="The true difference that a test like this finds four times of five">Detectable</th>
            <th scope="col">Verdict</th>
          </tr>
        </thead>
        <tbody>
          {rows.map(([name, result, entry]) => (
            <tr key={name}>
              <th scope="row" title={left(entry)}>
                <Inline text={name} />
                {left(entry) && <span class="muted"> *</span>}
              </th>
              {result ? (
                <>
                  <td class="numeric">{number(result.num_tasks)}</td>
                  <td class="numeric">{number(result.a, 3)}</td>
                  <td class="numeric">{number(result.b, 3)}</td>
                  <td class="numeric">{result.effect > 0 ? "+" : ""}{number(result.effect, 3)}</td>
                  <td class="wide">
                    <Interval mean={result.effect} low={result.low} high={result.high} from={-size} to={size} zero />
                  </td>
                  <td class="numeric muted">{between(result.low, result.high)}</td>
                  <td class="numeric">{number(result.p_adjusted, 2)}</td>
                  <td class="numeric">{number(result.minimal_detectable_effect, 2)}</td>
                  <td>
                    <span class={`chip ${VERDICTS[result.verdict]?.[0] ?? ""}`}>{VERDICTS[result.verdict]?.[1] ?? result.verdict}</span>
                  </td>
                </>
              ) : (
                <td colSpan={9} class="muted">
                  No task was measured in both.
                </td>
              )}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Flipped({ entry, a, b }: { entry: EntryComparison; a: RunSummary | undefined; b: RunSummary | undefined }) {
  if (!entry.gained.length && !entry.lost.length) return null;
  return (
    <section aria-label={`Flipped tasks of ${entry.name}`}>
      <h2>
        Tasks that flipped: <Inline text={entry.name} />
      </h2>
      <div class="two">
        <TaskList title="Gained: A failed, B solves" tasks={entry.gained} a={a} b={b} />
        <TaskList title="Lost: A solved, B fails" tasks={entry.lost} a={a} b={b} />
      </div>
    </section>
  );
}

function TaskList({ title, tasks, a, b }: { title: string; tasks: TaskPair[]; a: RunSummary | undefined; b: RunSummary | undefined }) {
  const episodes = (run: RunSummary | undefined, task: TaskPair) =>
    run && link(["run", run.id, "episodes"], { set: setOf(run, task.entry), task: task.task_id });
  return (
    <div class="panel">
      <h3 style={{ marginTop: 0 }}>
        {title} <span class="muted">{tasks.length}</span>
      </h3>
      {tasks.length === 0 && <p class="muted">None.</p>}
      {tasks.length > 0 && (
        <table>
          <thead>
            <tr>
              <th scope="col">Task</th>
              <th scope="col" class="numeric">A</th>
              <th scope="col" class="numeric">B</th>
            </tr>
          </thead>
          <tbody>
            {tasks.slice(0, 200).map((task) => (
              <tr key={task.task_digest}>
                <th scope="row" class="mono">
                  <Inline text={task.task_id} limit={80} />
                </th>
                <td class="numeric">
                  <a href={episodes(a, task)} aria-label={`Episodes of A on ${task.task_id}`}>{number(task.a, 3)}</a>
                </td>
                <td class="numeric">
                  <a href={episodes(b, task)} aria-label={`Episodes of B on ${task.task_id}`}>{number(task.b, 3)}</a>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {tasks.length > 200 && <p class="muted">{number(tasks.length - 200)} more: `polyturn eval compare` has all.</p>}
    </div>
  );
}
