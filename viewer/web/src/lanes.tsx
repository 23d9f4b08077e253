/** Where the seconds of an episode went, turn by turn: waiting, generating, in tools, and by which policy version. */

import type { EpisodeRow, Turn } from "./api";
import { number, seconds } from "./format";

interface Span {
  turn: number;
  from: number;
  to: number;
  title: string;
}

interface Lanes {
  total: number;
  unit: "s" | "tokens";
  queue: Span[];
  generate: Span[];
  tools: Span[];
  versions: Span[];
}

/** Turns that were not timed are as wide as the tokens that they sampled. */
function laneOf(turns: Turn[]): Lanes {
  const timed = turns.some((turn) => turn.generate_s !== null);
  const lanes: Lanes = { total: 0, unit: timed ? "s" : "tokens", queue: [], generate: [], tools: [], versions: [] };
  let at = 0;
  for (const turn of turns) {
    if (timed && turn.start_s !== null) at = Math.max(at, turn.start_s);
    const begin = at;
    const parts: [Span[], number, string][] = timed
      ? [
          [lanes.queue, turn.queue_s ?? 0, "waited"],
          [lanes.generate, turn.generate_s ?? 0, "generated"],
          [lanes.tools, turn.tools_s ?? 0, "in tools"],
        ]
      : [[lanes.generate, turn.num_sampled, "generated"]];
    for (const [lane, length, what] of parts) {
      if (length <= 0) continue;
      const amount = timed ? seconds(length) : `${number(length)} tokens`;
      lane.push({ turn: turn.turn, from: at, to: at + length, title: `Turn ${turn.turn}: ${what} ${amount}` });
      at += length;
    }
    if (turn.min_version !== null) {
      const label = turn.min_version === turn.max_version ? `${turn.min_version}` : `${turn.min_version}–${turn.max_version}`;
      lanes.versions.push({ turn: turn.turn, from: begin, to: at, title: label });
    }
  }
  lanes.total = at;
  return lanes;
}

interface Props {
  turns: Turn[];
  /** Of the whole episode, for those whose turns were not timed. */
  row: Pick<EpisodeRow, "generate_s" | "tools_s" | "queue_s" | "total_s">;
  onTurn: (turn: number) => void;
}

export function Swimlane({ turns, row, onTurn }: Props) {
  const lanes = laneOf(turns);
  if (lanes.total <= 0) return null;
  const rows: [string, string, Span[]][] = [
    ["Queue", "queue", lanes.queue],
    ["Generate", "generate", lanes.generate],
    ["Tools", "tool", lanes.tools],
    ["Policy version", "version", lanes.versions],
  ];
  const place = (span: Span) => ({
    left: `${(100 * span.from) / lanes.total}%`,
    width: `max(3px, ${(100 * (span.to - span.from)) / lanes.total}%)`,
  });
  return (
    <section class="panel swimlane" aria-label="Timeline">
      {rows
        .filter(([, , spans]) => spans.length)
        .map(([name, kind, spans]) => (
          <div key={name} class="lane">
            <span class="lane-name">{name}</span>
            <div class="lane-track">
              {spans.map((span) => (
                <button
                  key={`${span.turn}`} type="button" class={`span ${kind}`} style={place(span)}
                  title={kind === "version" ? `Turn ${span.turn}: policy version ${span.title}` : span.title}
                  aria-label={kind === "version" ? `Turn ${span.turn}: policy version ${span.title}` : span.title}
                  onClick={() => onTurn(span.turn)}
                >
                  {kind === "version" ? span.title : ""}
                </button>
              ))}
            </div>
          </div>
        ))}
      <div class="lane">
        <span class="lane-name muted" />
        <div class="lane-ends muted">
          <span>{lanes.unit === "s" ? "0" : `Turns were not timed: widths are tokens. In all ${seconds(row.generate_s)} generating, ${seconds(row.tools_s)} in tools, ${seconds(row.queue_s)} waiting.`}</span>
          <span>{lanes.unit === "s" ? seconds(lanes.total) : `${number(lanes.total)} tokens`}</span>
        </div>
      </div>
    </section>
  );
}
