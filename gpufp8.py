import sys, torch
sys.path.insert(0,'benchmarks/kernels')
import packed as P
from packed import *
from octavo.kernels.triton.experts import choose
from octavo.kernels.triton.experts.hopper import fp8 as H
from octavo.kernels.triton.experts.stacks import StackedExperts
from dataclasses import replace
def made(model,name):
    s=stack(model,name)
    return replace(s,is_by_tile=name=='fp8')
def quant(x,by):  # emulation
    g=x.view(len(x),-1,128) if by else x.view(len(x),1,-1)
    sc=g.abs().amax(-1,keepdim=True).clamp_min(1e-10)/448
    return ((g/sc).float().clamp(-448,448).to(torch.float8_e4m3fn).double()*sc.double()).view(x.shape)
def emulate(x,weights,ids,ex,model,by):
    layout=ex.gate_layout
    gate,up=(values_of(layout,one,model.hidden).view(model.experts,model.inner,-1).double() for one in ex.gate_up_planes)
    down=values_of(layout,ex.down_planes,model.inner).double().view(model.experts,model.hidden,-1)
    out=torch.zeros(x.shape,dtype=torch.double,device=CUDA)
    for e in range(model.experts):
        row,ch=(ids==e).nonzero(as_tuple=True)
        some=quant(x[row].float(),by) if len(row) else x[row].double()
        if not len(row): continue
        h=torch.nn.functional.silu(some@gate[e].T)*(some@up[e].T)
        if not by: h=h.bfloat16().double()
        h=quant(h.float(),by)
        out.index_add_(0,row,weights[row,ch,None].double()*(h@down[e].T))
    return out
def check():
    for model in (Model(512,384,8,2,()),Model(2048,768,16,4,()),Model(1024,128,3,1,())):
        for name in ('fp8','fp8_row'):
            ex=made(model,name)
            for count in (2,9,40,70,150,2200):
                x,ch=rows_of(count,model.hidden),routes(model,count)
                pairs=count*model.top_k
                assert H.fits(x,ex,'silu',pairs)
                sh=H.pieces_shape(pairs,model.experts)
                found=run(x,*ch,ex)
                torch.cuda.synchronize()
                e1=error_of(found,emulate(x,*ch,ex,model,name=='fp8')); e2=error_of(found,exact_experts(x,*ch,ex,model))
                print('ok' if e1<1e-2 and e2<6e-2 else 'WRONG',name,model.hidden,model.inner,count,sh.rows,f'{e1:.1e} {e2:.1e}',flush=True)
def times(models,names,tokens):
    keep=choose.fits
    for title in models:
        model=MODELS[title]
        for name in names:
            ex=made(model,name) if name!='bf16' else stack(model,name)
            for count in tokens:
                res=[]
                for new in ((False,True) if name!='bf16' else (False,)):
                    choose.fits=keep if new else (lambda *a: False)
                    calls,floor=expert_calls(model,ex,name,count)
                    res.append(graph_ms(calls,8)*1e3)
                print(title,name,count,'floor %.0f'%(floor*1e6),'old/new us',['%.0f'%r for r in res],flush=True)
            del ex; torch.cuda.empty_cache()
    choose.fits=keep
if __name__=='__main__':
    for a in sys.argv[1:]:
        if a=='check': check()
        if a=='qwen': times(['qwen3-30b'],['fp8','bf16'],[8,32,128,512,2048,8192])
        if a=='mix': times(['mixtral-8x7b'],['fp8_row','bf16'],[8,32,128,512,8192])
