"""The Gantt chart of a GPU over time as one self-contained HTML page: GPU% on the vertical axis.

A pure function from intervals to text. The simulator and `dstackctl status --timeline` (real decisions) draw
with it. The page scrolls and zooms without any library or network.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass

MAX_INTERVALS = 20_000


@dataclass(frozen=True, slots=True)
class Interval:
    """One batch on the GPU: times in microseconds, GPU% while it ran, rows in it, rows of them late."""

    name: str
    start_us: int
    end_us: int
    gpu_percent: float
    rows: int = 0
    late: int = 0


def stack(intervals: Sequence[Interval]) -> list[tuple[Interval, float]]:
    """Each interval with the GPU% at which its bar begins: the lowest gap that stays free while it runs.

    A bar never moves up or down, so where bars of others end a gap may stay: the chart can be a little
    higher than the sum of shares at that time.
    """
    placed: list[tuple[Interval, float]] = []
    live: list[tuple[int, float, float]] = []  # end, from, to
    for interval in sorted(intervals, key=lambda i: (i.start_us, i.end_us, i.name)):
        live = sorted((slot for slot in live if slot[0] > interval.start_us), key=lambda slot: slot[1])
        base = 0.0
        for _, low, high in live:
            if low - base >= interval.gpu_percent - 1e-9:
                break
            base = max(base, high)
        live.append((interval.end_us, base, base + interval.gpu_percent))
        placed.append((interval, base))
    return placed


def timeline_html(intervals: Sequence[Interval], *, title: str, capacity_percent: float = 100.0) -> str:
    """The page. The last MAX_INTERVALS intervals are drawn; the page says how many were left out."""
    kept = sorted(intervals, key=lambda i: i.end_us)[-MAX_INTERVALS:]
    placed = stack(kept)
    names = sorted({i.name for i in kept})
    origin = min((i.start_us for i in kept), default=0)
    bars = [
        [
            names.index(i.name), i.start_us - origin, i.end_us - origin, round(base, 2),
            round(i.gpu_percent, 2), i.rows, i.late,
        ]
        for i, base in placed
    ]  # fmt: skip
    top = max([capacity_percent, 100.0, *(base + i.gpu_percent for i, base in placed)])
    data = {"names": names, "bars": bars, "capacity": capacity_percent, "top": top}
    left_out = len(intervals) - len(kept)
    note = f"{left_out} earlier batches are not drawn. " if left_out else ""
    # "<" never appears in the data, so no model name can end the script.
    payload = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        _PAGE.replace("@TITLE@", html.escape(title))
        .replace("@NOTE@", html.escape(note))
        .replace("@DATA@", payload)
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<style>
:root{color-scheme:light dark;--ink:#1c2430;--dim:#6b7787;--paper:#fff;--rule:#dfe4ea}
@media (prefers-color-scheme:dark){:root{--ink:#e8ecf1;--dim:#93a0b0;--paper:#14181d;--rule:#2b333d}}
body{font:14px system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:1.2rem}
h1{font-size:1.1rem;margin:0 0 .3rem}p{color:var(--dim);margin:.2rem 0}
#legend{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin:.6rem 0}
#legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.35rem}
canvas{width:100%;height:26rem;display:block;border:1px solid var(--rule);cursor:grab;touch-action:none}
#tip{position:fixed;pointer-events:none;background:var(--ink);color:var(--paper);padding:.25rem .5rem;
border-radius:4px;font-size:12px;display:none;white-space:pre}
</style></head><body>
<h1>@TITLE@</h1>
<p>@NOTE@Each bar is one batch: its height is its GPU%, red at its top is the part of its rows that was late.
Wheel: zoom. Drag: move. Double click: everything.</p>
<div id="legend"></div><canvas id="chart"></canvas><div id="tip"></div>
<script>
"use strict";
const data=@DATA@;
const canvas=document.getElementById("chart"),tip=document.getElementById("tip");
const context=canvas.getContext("2d"),left=48,bottom=24;
const end=data.bars.reduce((most,bar)=>Math.max(most,bar[2]),1);
let from=Math.max(0,end-Math.min(end,100000)),to=end;
const colour=n=>`hsl(${(n*137.5)%360} 55% 55%)`;
const legend=document.getElementById("legend");
data.names.forEach((name,n)=>{const item=document.createElement("span"),box=document.createElement("i");
box.style.background=colour(n);item.append(box,name);legend.append(item)});
function draw(){
const scale=devicePixelRatio||1,width=canvas.clientWidth,height=canvas.clientHeight;
canvas.width=width*scale;canvas.height=height*scale;context.setTransform(scale,0,0,scale,0,0);
const style=getComputedStyle(document.documentElement);
const ink=style.getPropertyValue("--dim"),rule=style.getPropertyValue("--rule");
const x=t=>left+(t-from)/(to-from)*(width-left),y=p=>(height-bottom)*(1-p/data.top);
context.clearRect(0,0,width,height);context.font="11px system-ui";context.fillStyle=ink;
for(let p=0;p<=data.top;p+=data.top>250?50:25){context.fillStyle=rule;context.fillRect(left,y(p),width,1);
context.fillStyle=ink;context.fillText(p+"%",8,y(p)+(p?4:-2))}
const span=to-from,step=Math.pow(10,Math.floor(Math.log10(span/4)));
for(let t=Math.ceil(from/step)*step;t<to;t+=step){
context.fillStyle=rule;context.fillRect(x(t),0,1,height-bottom);
if(span/step<14||Math.round(t/step)%5===0){context.fillStyle=ink;
context.fillText((t/1000).toFixed(Math.max(0,3-Math.floor(Math.log10(step))))+" ms",x(t)+3,height-8)}}
context.save();context.beginPath();context.rect(left,0,width-left,height-bottom);context.clip();
for(const[n,s,e,base,p,rows,late]of data.bars){if(e<from||s>to)continue;
const wide=Math.max(x(e)-x(s)-1,1),high=y(base)-y(base+p)-1;
context.fillStyle=colour(n);context.fillRect(x(s),y(base+p),wide,high);
if(late){context.fillStyle="#d22";context.fillRect(x(s),y(base+p),wide,Math.max(2,high*late/Math.max(rows,1)))}
if(wide>24&&high>12){context.fillStyle="#fff";context.fillText(rows,x(s)+4,y(base+p)+high/2+4)}}
context.restore();context.fillStyle="#d22";context.fillRect(left,y(data.capacity),width,1)}
function at(event){const box=canvas.getBoundingClientRect();
return[from+(event.clientX-box.left-left)/(box.width-left)*(to-from),
data.top*(1-(event.clientY-box.top)/(box.height-bottom))]}
canvas.addEventListener("wheel",event=>{event.preventDefault();const[t]=at(event),
factor=event.deltaY>0?1.25:0.8;from=Math.max(0,t-(t-from)*factor);to=Math.min(end,t+(to-t)*factor);
if(to-from<50)to=from+50;draw()},{passive:false});
let drag=null;
canvas.addEventListener("pointerdown",event=>{
drag=[event.clientX,from,to];canvas.setPointerCapture(event.pointerId)});
canvas.addEventListener("pointerup",()=>{drag=null});
canvas.addEventListener("dblclick",()=>{from=0;to=end;draw()});
canvas.addEventListener("pointermove",event=>{
if(drag){const move=(event.clientX-drag[0])/(canvas.clientWidth-left)*(drag[2]-drag[1]);
from=drag[1]-move;to=drag[2]-move;draw();return}
const[t,p]=at(event),bar=data.bars.find(b=>b[1]<=t&&t<=b[2]&&b[3]<=p&&p<=b[3]+b[4]);
tip.style.display=bar?"block":"none";
if(bar){tip.textContent=`${data.names[bar[0]]}: ${bar[5]} rows at ${bar[4]}%, `+
`${((bar[2]-bar[1])/1000).toFixed(2)} ms from ${(bar[1]/1000).toFixed(2)} ms`+(bar[6]?`, ${bar[6]} late`:"");
tip.style.left=event.clientX+12+"px";tip.style.top=event.clientY+12+"px"}});
addEventListener("resize",draw);draw();
</script></body></html>
"""
