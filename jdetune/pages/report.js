(()=>{const box=document.querySelector('.tools');if(!box)return;box.hidden=false;
const input=box.querySelector('input'),said=box.querySelector('output');
const kinds=[...document.querySelectorAll('details.kind')],was=kinds.map(k=>k.open);
input.addEventListener('input',()=>{const words=input.value.toLowerCase().split(/\s+/).filter(Boolean);let n=0;
kinds.forEach((kind,i)=>{let here=0;for(const row of kind.querySelectorAll('tbody tr')){
const text=row.textContent.toLowerCase(),hit=words.every(w=>text.includes(w));row.hidden=!hit;here+=hit}
n+=here;kind.hidden=!here;kind.open=words.length?here>0&&here<200:was[i]});
said.textContent=words.length?n.toLocaleString()+' found':''});
const value=c=>{const t=c.textContent.replace(/\u2212/g,'-').replace(/^10(?=-)/,'').replace(/[,%\u00d7<>]/g,'');
const v=parseFloat(t);return isNaN(v)?null:v};
for(const th of document.querySelectorAll('table.tensors thead th')){const b=document.createElement('button');
b.textContent=th.textContent;th.replaceChildren(b);b.addEventListener('click',()=>{
const up=th.getAttribute('aria-sort')!=='ascending',row=th.parentNode,at=[...row.children].indexOf(th);
for(const o of row.children)o.removeAttribute('aria-sort');th.setAttribute('aria-sort',up?'ascending':'descending');
const body=th.closest('table').tBodies[0],rows=[...body.rows];rows.sort((a,b)=>{const x=value(a.cells[at]),
y=value(b.cells[at]);const d=at&&x!==null&&y!==null?x-y:a.cells[at].textContent.localeCompare(
b.cells[at].textContent,undefined,{numeric:true});return up?d:-d});body.append(...rows)})}
addEventListener('beforeprint',()=>kinds.forEach(k=>{if(k.querySelectorAll('tr').length<60)k.open=true}))})();
