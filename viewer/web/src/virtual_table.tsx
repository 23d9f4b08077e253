/** A table of any length: only the rows in sight are in the document. */

import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

import { useKeys } from "./keyboard";

export interface Column<Row> {
  key: string;
  label: string;
  /** In px; the last column takes what is left. */
  width: number;
  numeric?: boolean;
  sortable?: boolean;
  title?: string;
  cell: (row: Row) => ComponentChildren;
}

export interface Sort {
  key: string;
  descending: boolean;
}

interface Props<Row> {
  label: string;
  columns: Column<Row>[];
  count: number;
  /** undefined: still to come. */
  row: (index: number) => Row | undefined;
  /** The rows from `first` to before `end` are in sight. */
  onVisible?: (first: number, end: number) => void;
  sort?: Sort | null;
  onSort?: (sort: Sort) => void;
  href?: (row: Row) => string;
  /** When it changes these are other rows, and the first of them are shown. */
  restart?: string;
  empty?: string;
}

const ROW = 34;
const AROUND = 8;

export function VirtualTable<Row>(props: Props<Row>) {
  const { columns, count } = props;
  const scroller = useRef<HTMLDivElement>(null);
  const [view, setView] = useState({ top: 0, height: 600 });
  const [selected, setSelected] = useState(0);
  const first = Math.max(0, Math.floor(view.top / ROW) - AROUND);
  const end = Math.min(count, Math.ceil((view.top + view.height) / ROW) + AROUND);

  useLayoutEffect(() => {
    const element = scroller.current;
    if (!element) return;
    const measure = () => setView({ top: element.scrollTop, height: element.clientHeight });
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  useEffect(() => props.onVisible?.(first, end), [first, end, props.onVisible]);
  const started = useRef(props.restart);
  useLayoutEffect(() => {
    if (started.current === props.restart) return;
    started.current = props.restart;
    setSelected(0);
    setView((before) => ({ ...before, top: 0 }));
    if (scroller.current) scroller.current.scrollTop = 0;
  }, [props.restart]);
  useEffect(() => setSelected((before) => Math.min(before, Math.max(0, count - 1))), [count]);

  const select = (index: number) => {
    const next = Math.max(0, Math.min(count - 1, index));
    setSelected(next);
    const element = scroller.current;
    if (!element) return;
    const top = next * ROW;
    const room = element.clientHeight - ROW; // The head covers a row of it.
    if (top < element.scrollTop) element.scrollTop = top;
    else if (top + ROW > element.scrollTop + room) element.scrollTop = top + ROW - room;
  };
  const open = () => {
    const row = props.row(selected);
    if (row !== undefined && props.href) location.hash = props.href(row);
  };
  const page = Math.max(1, Math.floor(view.height / ROW) - 2);
  useKeys([
    { keys: ["j", "ArrowDown"], help: "next row", run: () => select(selected + 1) },
    { keys: ["k", "ArrowUp"], help: "previous row", run: () => select(selected - 1) },
    { keys: ["PageDown"], help: "", run: () => select(selected + page) },
    { keys: ["PageUp"], help: "", run: () => select(selected - page) },
    { keys: ["Home", "g"], help: "first row", run: () => select(0) },
    { keys: ["End", "G"], help: "last row", run: () => select(count - 1) },
    { keys: ["Enter", "o"], help: "open the row", run: open },
  ]);

  const width = columns.reduce((sum, column) => sum + column.width, 0);
  const template = columns.map((column, at) => (at === columns.length - 1 ? `minmax(${column.width}px, 1fr)` : `${column.width}px`)).join(" ");
  const rows = [];
  for (let index = first; index < end; index++) {
    const row = props.row(index);
    rows.push(
      <div
        key={index}
        id={`row-${index}`}
        class={`vrow${index === selected ? " selected" : ""}${row === undefined ? " coming" : ""}`}
        role="row"
        aria-rowindex={index + 2}
        aria-selected={index === selected}
        style={{ top: `${index * ROW}px`, gridTemplateColumns: template }}
        onClick={(event) => {
          setSelected(index);
          if (row !== undefined && props.href && !(event.target as HTMLElement).closest("a")) location.hash = props.href(row);
        }}
      >
        {columns.map((column, at) => (
          <div key={column.key} role="gridcell" class={column.numeric ? "numeric" : ""}>
            {row === undefined ? (
              at === 0 ? "…" : ""
            ) : at === 0 && props.href ? (
              <a href={props.href(row)} tabIndex={index === selected ? 0 : -1}>
                {column.cell(row)}
              </a>
            ) : (
              column.cell(row)
            )}
          </div>
        ))}
      </div>,
    );
  }
  return (
    <div
      class="vtable"
      ref={scroller}
      role="grid"
      aria-label={props.label}
      aria-rowcount={count + 1}
      aria-colcount={columns.length}
      aria-activedescendant={count ? `row-${selected}` : undefined}
      tabIndex={0}
      style={{ height: `${Math.min(640, (Math.max(count, 2) + 1) * ROW + 18)}px` }}
      onScroll={(event) => setView({ top: event.currentTarget.scrollTop, height: event.currentTarget.clientHeight })}
    >
      <div role="rowgroup" class="vtop" style={{ minWidth: `${width}px` }}>
        <div class="vhead" role="row" aria-rowindex={1} style={{ gridTemplateColumns: template }}>
          {columns.map((column) => {
            const sorted = props.sort?.key === column.key ? props.sort : null;
            return (
              <div
                key={column.key}
                role="columnheader"
                class={column.numeric ? "numeric" : ""}
                title={column.title}
                aria-sort={sorted ? (sorted.descending ? "descending" : "ascending") : undefined}
              >
                {column.sortable && props.onSort ? (
                  <button
                    type="button"
                    onClick={() => props.onSort?.({ key: column.key, descending: sorted ? !sorted.descending : !!column.numeric })}
                  >
                    {column.label}
                    <span aria-hidden="true">{sorted ? (sorted.descending ? " ↓" : " ↑") : ""}</span>
                  </button>
                ) : (
                  column.label
                )}
              </div>
            );
          })}
        </div>
      </div>
      <div class="vbody" role="rowgroup" style={{ height: `${count * ROW}px`, minWidth: `${width}px` }}>
        {rows}
      </div>
      {count === 0 && <p class="empty">{props.empty ?? "Nothing here."}</p>}
    </div>
  );
}
