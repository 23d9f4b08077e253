/** What else is known of a run: its alarms, its held-out evaluations, where the time went, and its config. */

import type { RunSummary } from "../api";
import { useAnswer } from "../client";
import { ago, number, percent, seconds } from "../format";
import { between, Interval } from "../interval";
import { Alarms, Facts, Problems, Ready } from "../parts";
import { link } from "../router";
import { Foreign, Inline } from "../visible_text";

export function AboutView({ run }: { run: RunSummary }) {
  const asked = useAnswer("/api/run", { run: run.id });
  return (
    <Ready of={asked}>
      {({ config, alarms, evaluations, seconds: spent, versions, problems }) => {
        const total = Object.values(spent).reduce<number>((sum, one) => sum + (one ?? 0), 0);
        return (
          <>
            <Problems problems={problems} />
            <Facts
              facts={[
                ["directory", <code key="path"><Inline text={run.path} limit={400} /></code>],
                ...(run.started !== null ? ([["started", ago(run.started)]] as [string, string][]) : []),
                ...(run.updated !== null ? ([["last written", ago(run.updated)]] as [string, string][]) : []),
                ...Object.entries(versions),
              ]}
            />
            {alarms.length > 0 && <h2>Alarms</h2>}
            <Alarms alarms={alarms} />
            {evaluations.length > 0 && (
              <>
                <h2>Held-out evaluations</h2>
                <div class="panel scroll" tabIndex={0} role="region" aria-label="Held-out evaluations">
                  <table>
                    <thead>
                      <tr>
                        <th scope="col">When</th>
                        <th scope="col">Suite</th>
                        <th scope="col" class="numeric">Mean</th>
                        <th scope="col" />
                        <th scope="col" class="numeric">Interval</th>
                        <th scope="col" class="numeric">Tasks</th>
                      </tr>
                    </thead>
                    <tbody>
                      {evaluations.map((one, at) => (
                        <tr key={at}>
                          <th scope="row">
                            {one.set === null ? one.when : <a href={link(["run", run.id, "episodes"], { set: one.set })}>{one.when}</a>}
                          </th>
                          <td>
                            <Inline text={one.suite} />
                          </td>
                          <td class="numeric">{number(one.mean, 3)}</td>
                          <td class="wide">{one.mean !== null && <Interval mean={one.mean} low={one.low} high={one.high} from={0} to={1} />}</td>
                          <td class="numeric muted">{between(one.low, one.high)}</td>
                          <td class="numeric">{number(one.num_tasks)}</td>
                        </tr>
                      ))}
                    </tbody>
                  </table>
                </div>
              </>
            )}
            {total > 0 && (
              <>
                <h2>Where the seconds went</h2>
                <div class="panel">
                  <table>
                    <tbody>
                      {Object.entries(spent).map(([phase, amount]) => (
                        <tr key={phase}>
                          <th scope="row">
                            <Inline text={phase} />
                          </th>
                          <td class="numeric">{seconds(amount)}</td>
                          <td class="numeric muted">{percent((amount ?? 0) / total)}</td>
                        </tr>
                      ))}
                    </tbody>
                  </table>
                </div>
              </>
            )}
            {config !== null && (
              <>
                <h2>Config</h2>
                <div class="panel">
                  <Foreign text={config} mono />
                </div>
              </>
            )}
          </>
        );
      }}
    </Ready>
  );
}
