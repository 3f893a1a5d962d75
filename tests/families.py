import torch, transformers as T
def small(fam, layers=4):
    torch.manual_seed(0)
    kw=dict(vocab_size=128)
    ll=dict(hidden_size=64,intermediate_size=128,num_hidden_layers=layers,num_attention_heads=4,num_key_value_heads=2,max_position_embeddings=256, pad_token_id=0,bos_token_id=1,eos_token_id=2)
    c={
     'llama':lambda:T.LlamaConfig(**kw,**ll),
     'mistral':lambda:T.MistralConfig(**kw,**ll,sliding_window=None),
     'qwen2':lambda:T.Qwen2Config(**kw,**ll),
     'phi3':lambda:T.Phi3Config(**kw,**ll),
     'gpt2':lambda:T.GPT2Config(**kw,n_embd=64,n_layer=layers,n_head=4,n_positions=256,bos_token_id=1,eos_token_id=2),
     'opt':lambda:T.OPTConfig(**kw,hidden_size=64,ffn_dim=128,num_hidden_layers=layers,num_attention_heads=4,max_position_embeddings=256,word_embed_proj_dim=64,pad_token_id=1,bos_token_id=2,eos_token_id=2),
     'gpt_neox':lambda:T.GPTNeoXConfig(**kw,hidden_size=64,intermediate_size=128,num_hidden_layers=layers,num_attention_heads=4,max_position_embeddings=256,bos_token_id=1,eos_token_id=2),
     'gemma':lambda:T.GemmaConfig(**kw,**{**ll,'num_key_value_heads':1},head_dim=16),
     'gemma2':lambda:T.Gemma2Config(**kw,**ll,head_dim=16,sliding_window=8),
     'gemma3':lambda:T.Gemma3TextConfig(**kw,**ll,head_dim=16,sliding_window=8),
     'qwen3':lambda:T.Qwen3Config(**kw,**ll,head_dim=16),
     'bloom':lambda:T.BloomConfig(**kw,hidden_size=64,n_layer=layers,n_head=4),
     'gptj':lambda:T.GPTJConfig(**kw,n_embd=64,n_layer=layers,n_head=4,rotary_dim=8,n_positions=256),
     'falcon':lambda:T.FalconConfig(**kw,hidden_size=64,num_hidden_layers=layers,num_attention_heads=4,bos_token_id=1,eos_token_id=2,alibi=False,multi_query=True,parallel_attn=True,new_decoder_architecture=False),
     'phi':lambda:T.PhiConfig(**kw,**ll),
     'starcoder2':lambda:T.Starcoder2Config(**kw,**ll),
     'stablelm':lambda:T.StableLmConfig(**kw,**ll),
     'cohere':lambda:T.CohereConfig(**kw,**ll),
     'mpt':lambda:T.MptConfig(vocab_size=128,d_model=64,n_layers=layers,n_heads=4,max_seq_len=256),
     'olmo2':lambda:T.Olmo2Config(**kw,**ll),
    }[fam]()
    m=T.AutoModelForCausalLM.from_config(c).eval()
    for p in m.parameters():
        if p.dim()>1: p.data.mul_(2.0)
        else: p.data.add_(torch.randn_like(p)*0.05)
    return m
