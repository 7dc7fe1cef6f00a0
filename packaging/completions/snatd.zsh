#compdef snatd
# Completion of snatd for zsh. A test compares it with the program's own parser.

local -a commands common
commands=(
    'run:run the daemon in the foreground'
    'check:say what is wrong with the rules of this node, and change nothing'
    'apply:put the rules of this node right once, and say what was done'
    'confirm:keep what a waiting apply --confirm has done'
    'status:show what the running daemon says of itself'
    'save:bring the saved rules files in line, and show what was changed'
    'revert:put back the rules that were there before'
    'flows:list the connections whose container is still seen as somebody else'
    'verify:send a datagram to each neighbour'
    'doctor:find what makes containers lose their address or their way'
    'explain:say who would rewrite the source of a packet'
)
common=('--help[show help]' '--config[configuration file]:file:_files')

if (( CURRENT == 2 )); then
    _describe command commands
    _arguments '--help[show help]' '--version[show the version]'
    return
fi
case $words[2] in
    run) _arguments ':command:' $common ;;
    check|confirm|revert|verify|doctor) _arguments ':command:' $common '--json[one JSON object]' ;;
    status) _arguments ':command:' $common '--json[one JSON object]' '--watch[go on showing it]::seconds:' ;;
    apply) _arguments ':command:' $common '--json[one JSON object]' '--confirm[put everything back unless confirmed]:seconds:' ;;
    save) _arguments ':command:' $common '--json[one JSON object]' '--dry-run[only show it]' '--full[save all live rules]' '--without-dynamic[leave out the chains of Docker, Kubernetes and CNI]' ;;
    flows) _arguments ':command:' $common '--json[one JSON object]' '--delete[delete these]:which:(udp all)' ;;
    explain) _arguments ':command:' $common '--json[one JSON object]' '--out[device it leaves by]:device:_net_interfaces' '--mark[its mark]:mark:' '--proto[its protocol]:protocol:(tcp udp icmp)' '--dport[destination port]:port:' ;;
esac
