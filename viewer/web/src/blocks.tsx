/** What renderers of environments make of a message. All texts in it are foreign. */

import { useState } from "preact/hooks";

import type { Block } from "./api";
import { number } from "./format";
import { Foreign, Inline, plain } from "./visible_text";

export function BlockView({ block }: { block: Block }) {
  const title = block.title ?? ("path" in block ? block.path : null);
  return (
    <div class="block">
      {title && (
        <div class="title">
          <Inline text={title} />
        </div>
      )}
      <Body block={block} />
    </div>
  );
}

function Body({ block }: { block: Block }) {
  switch (block.kind) {
    case "text":
      return <Foreign text={block.text} />;
    case "board":
      return <Board cells={block.cells} marks={block.marks} />;
    case "passages":
      return (
        <ol class="passages">
          {block.passages.map((passage, at) => (
            <li key={at}>
              <span class="muted">{passage.rank ?? at + 1}.</span>{" "}
              <span class="title">
                <Inline text={passage.title} />
              </span>{" "}
              {passage.score !== null && <span class="muted">{number(passage.score, 3)}</span>}
              <Foreign text={passage.text} />
            </li>
          ))}
        </ol>
      );
    case "file":
      return (
        <div class="codelike">
          <Foreign text={block.text} mono />
        </div>
      );
    case "diff":
      return <Diff text={block.text} />;
    case "table":
      return <Cells columns={block.columns} rows={block.rows} />;
  }
}

function Board({ cells, marks }: { cells: string[][]; marks: { row: number; column: number; why: string }[] }) {
  const why = new Map(marks.map((mark) => [`${mark.row},${mark.column}`, mark.why]));
  return (
    <div class="board" role="table" aria-label="Board">
      {cells.map((row, y) => (
        <div key={y} role="row">
          {row.map((cell, x) => {
            const mark = why.get(`${y},${x}`);
            return (
              <span key={x} role="cell" class={mark === undefined ? "" : "marked"} title={mark === undefined ? undefined : plain(mark)}>
                {plain(cell).slice(0, 6)}
              </span>
            );
          })}
        </div>
      ))}
    </div>
  );
}

const LINES = 200;

function Diff({ text }: { text: string }) {
  const [shown, setShown] = useState(LINES);
  const lines = text.split("\n");
  const kind = (line: string) => {
    if (line.startsWith("+++") || line.startsWith("---") || line.startsWith("@@") || line.startsWith("diff ")) return "hunk";
    return line.startsWith("+") ? "plus" : line.startsWith("-") ? "minus" : "";
  };
  return (
    <>
      <div class="diff">
        {lines.slice(0, shown).map((line, at) => (
          <div key={at} class={kind(line)}>
            {line ? <Inline text={line} limit={2000} /> : " "}
          </div>
        ))}
      </div>
      {lines.length > shown && (
        <button type="button" class="quiet" onClick={() => setShown(shown + 2000)}>
          Show more of {number(lines.length - shown)} lines
        </button>
      )}
    </>
  );
}

function Cells({ columns, rows }: { columns: string[]; rows: string[][] }) {
  const [shown, setShown] = useState(50);
  return (
    <div class="scroll">
      <table>
        <thead>
          <tr>
            {columns.map((name, at) => (
              <th key={at} scope="col">
                <Inline text={name} />
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.slice(0, shown).map((row, at) => (
            <tr key={at}>
              {row.map((cell, column) => (
                <td key={column}>
                  <Inline text={cell} limit={1000} />
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
      {rows.length > shown && (
        <button type="button" class="quiet" onClick={() => setShown(shown + 500)}>
          Show more of {number(rows.length - shown)} rows
        </button>
      )}
    </div>
  );
}
