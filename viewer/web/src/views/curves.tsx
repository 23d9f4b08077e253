/** Curves of one run or of several over one another, with a slider through the steps. */

import { useMemo, useState } from "preact/hooks";

import type { Curve as ApiCurve, Metrics, RunSummary, StepSummary } from "../api";
import type { Curve } from "../chart";
import { Chart } from "../chart";
import { useAnswer } from "../client";
import { number } from "../format";
import { useKeys } from "../keyboard";
import { Alarms, COLORS, DASHES, Problems, Ready } from "../parts";
import { link, setQuery, useRoute } from "../router";
import { cssColor, useThemeChanges } from "../theme";
import { Inline } from "../visible_text";
import type { Column } from "../virtual_table";
import { VirtualTable } from "../virtual_table";

export function CurvesView({ runs, single }: { runs: RunSummary[]; single: boolean }) {
  const { query } = useRoute();
  const chosen = query.getAll("name");
  const ids = runs.map((run) => run.id);
  const asked = useAnswer("/api/metrics", { run: ids, ...(chosen.length ? { name: chosen } : {}) });
  const alarms = runs.flatMap((run) => run.alarms);
  return (
    <>
      {single && <Alarms alarms={alarms} />}
      <Ready of={asked}>{(metrics) => <Curves runs={runs} metrics={metrics} chosen={chosen} />}</Ready>
      {single && runs[0] && <StepList run={runs[0]} />}
    </>
  );
}

function Curves({ runs, metrics, chosen }: { runs: RunSummary[]; metrics: Metrics; chosen: string[] }) {
  const { query } = useRoute();
  const theme = useThemeChanges();
  const steps = useMemo(
    () => [...new Set(metrics.curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b),
    [metrics],
  );
  const asked = query.get("step");
  const step = asked === null ? null : Number(asked);
  const at = step === null ? steps.length - 1 : Math.max(0, steps.findIndex((one) => one >= step));
  const choose = (index: number) => {
    const last = index >= steps.length - 1;
    setQuery({ step: last ? null : steps[Math.max(0, index)] });
  };
  useKeys([
    { keys: ["ArrowRight", "l"], help: "next step", run: () => choose(at + 1) },
    { keys: ["ArrowLeft", "h"], help: "previous step", run: () => choose(at - 1) },
  ]);
  const byName = useMemo(() => {
    const table = new Map<string, ApiCurve[]>();
    for (const curve of metrics.curves) table.set(curve.name, [...(table.get(curve.name) ?? []), curve]);
    return table;
  }, [metrics]);
  const charts = useMemo(() => {
    const color = (place: number) => ({
      color: cssColor(COLORS[place % COLORS.length] ?? "--c0"),
      dash: DASHES[Math.floor(place / COLORS.length) % DASHES.length],
    });
    const drawn = ({ steps, values, low, high }: ApiCurve) => ({ steps, values, low, high });
    const single = runs.length === 1;
    // Of one run metrics of one kind lie over one another; of several runs one metric does.
    const together = chosen.length ? chosen.map((name) => ({ title: name, names: [name] })) : metrics.overview;
    const apart = single ? together : together.flatMap(({ names }) => names.map((name) => ({ title: name, names: [name] })));
    return apart
      .map(({ title, names }) => ({
        title,
        isLabelled: single && (names.length > 1 || title !== names[0]),
        curves: names.flatMap((name, at) =>
          (byName.get(name) ?? []).map((curve): Curve => {
            const place = runs.findIndex((run) => run.id === curve.run);
            return single ? { label: name, ...color(at), ...drawn(curve) } : { label: runs[place]?.name ?? curve.run, ...color(place), ...drawn(curve) };
          }),
        ),
        about: Object.fromEntries(
          names.flatMap((name) => (single ? [[name, metrics.about[name]]] : runs.map((run) => [run.name, metrics.about[name]]))),
        ),
      }))
      .filter(({ curves }) => curves.length);
  }, [metrics, chosen.join("\n"), theme, runs.map((run) => run.id).join()]);
  return (
    <>
      <Problems problems={metrics.problems} />
      {runs.length > 1 && (
        <p class="legend" aria-label="Runs">
          {runs.map((run, place) => (
            <a key={run.id} href={link(["run", run.id, "curves"])}>
              <span class="swatch" style={{ background: `var(${COLORS[place % COLORS.length]})` }} />
              <Inline text={run.name} />
            </a>
          ))}
        </p>
      )}
      {steps.length > 1 && (
        <div class="slider">
          <label for="step-slider">Step</label>
          <input
            id="step-slider"
            type="range"
            min={0}
            max={steps.length - 1}
            value={at}
            aria-valuetext={`step ${steps[at]}`}
            onInput={(event) => choose(Number(event.currentTarget.value))}
          />
          <output for="step-slider">
            {runs.length === 1 ? (
              <a href={link(["run", runs[0]?.id ?? "", "episodes"], { step: steps[at] })}>{steps[at]}: episodes</a>
            ) : (
              steps[at]
            )}
          </output>
        </div>
      )}
      {charts.length ? (
        <div class="charts">
          {charts.map((chart) => (
            <Chart key={chart.title} {...chart} step={step === null ? null : (steps[at] ?? null)} onStep={(value) => setQuery({ step: value })} />
          ))}
        </div>
      ) : (
        <p class="empty">No step has been finished.</p>
      )}
      <MetricChoice names={metrics.names} chosen={chosen} headline={metrics.headline} />
    </>
  );
}

function MetricChoice({ names, chosen, headline }: { names: string[]; chosen: string[]; headline: string[] }) {
  const [search, setSearch] = useState("");
  if (!names.length) return null;
  const current = chosen.length ? chosen : headline;
  const set = (next: string[]) => {
    const query = new URLSearchParams(location.hash.split("?")[1] ?? "");
    query.delete("name");
    for (const name of next) query.append("name", name);
    history.replaceState(history.state, "", `${location.hash.split("?")[0]}?${query}`);
    dispatchEvent(new HashChangeEvent("hashchange"));
  };
  const found = names.filter((name) => name.toLowerCase().includes(search.toLowerCase()));
  return (
    <details class="choice">
      <summary>
        Other metrics ({number(names.length)}){chosen.length > 0 && ", chosen"}
      </summary>
      <div class="filters">
        <input type="search" placeholder="Find a metric" aria-label="Find a metric" value={search} onInput={(event) => setSearch(event.currentTarget.value)} />
        {chosen.length > 0 && (
          <button type="button" class="plain" onClick={() => set([])}>
            The headline ones
          </button>
        )}
      </div>
      <div class="metric-names">
        {found.slice(0, 200).map((name) => (
          <label key={name} class="check">
            <input
              type="checkbox"
              checked={current.includes(name)}
              onChange={() => set(current.includes(name) ? current.filter((one) => one !== name) : [...current, name])}
            />
            <Inline text={name} limit={80} />
          </label>
        ))}
      </div>
      {found.length > 200 && <p class="muted">{number(found.length - 200)} more: type a part of the name.</p>}
    </details>
  );
}

const STEP_COLUMNS: Column<StepSummary>[] = [
  { key: "step", label: "Step", width: 80, cell: (row) => <>{row.step}{row.is_live && <span class="live vh">live</span>}</> },
  { key: "episodes", label: "Episodes", width: 90, numeric: true, cell: (row) => number(row.num_episodes) },
  { key: "reward", label: "Reward", width: 90, numeric: true, cell: (row) => number(row.reward_mean, 3) },
  {
    key: "range", label: "Least, most", width: 110, numeric: true,
    cell: (row) => `${number(row.reward_low, 3)}, ${number(row.reward_high, 3)}`,
  },
  {
    key: "uniform", label: "Uniform groups", width: 120, numeric: true, title: "Groups whose rewards are all alike: nothing is learnt from them",
    cell: (row) => `${row.num_uniform_groups} of ${row.num_groups}`,
  },
  { key: "truncated", label: "Truncated", width: 90, numeric: true, cell: (row) => number(row.outcomes.truncated ?? 0) },
  { key: "failed", label: "Failed", width: 80, numeric: true, cell: (row) => number(row.outcomes.failed ?? 0) },
  { key: "tools", label: "Tool errors", width: 100, numeric: true, cell: (row) => number(row.num_tool_errors) },
  {
    key: "alarms", label: "Alarms", width: 160,
    cell: (row) => (row.is_live ? <span class="chip accent live">under way</span> : row.alarms.map((name) => <span key={name} class="chip warn"><Inline text={name} /></span>)),
  },
];

function StepList({ run }: { run: RunSummary }) {
  const set = run.sets.find((one) => one.kind === "train") ?? run.sets[0];
  const asked = useAnswer("/api/steps", set ? { run: run.id, set: set.name } : null);
  if (!set) return null;
  return (
    <section aria-label="Steps">
      <h2>Steps</h2>
      <Ready of={asked}>
        {({ steps }) => {
          const newest = [...steps].reverse();
          return (
            <VirtualTable
              label="Steps, the newest first"
              columns={STEP_COLUMNS}
              count={newest.length}
              row={(index) => newest[index]}
              href={(row) => link(["run", run.id, "episodes"], { set: set.name, step: row.step })}
              empty="No step has episodes."
            />
          );
        }}
      </Ready>
    </section>
  );
}
