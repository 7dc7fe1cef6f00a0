# Completion of snatd for fish. A test compares it with the program's own parser.

complete -c snatd -f
complete -c snatd -l help -d 'Show help'
complete -c snatd -n __fish_use_subcommand -l version -d 'Show the version'

complete -c snatd -n __fish_use_subcommand -a run -d 'Run the daemon in the foreground'
complete -c snatd -n __fish_use_subcommand -a check -d 'Say what is wrong, and change nothing'
complete -c snatd -n __fish_use_subcommand -a apply -d 'Put the rules right once'
complete -c snatd -n __fish_use_subcommand -a confirm -d 'Keep what a waiting apply --confirm has done'
complete -c snatd -n __fish_use_subcommand -a status -d 'Show what the running daemon says of itself'
complete -c snatd -n __fish_use_subcommand -a save -d 'Bring the saved rules files in line'
complete -c snatd -n __fish_use_subcommand -a revert -d 'Put back the rules that were there before'
complete -c snatd -n __fish_use_subcommand -a flows -d 'List connections that still hide their container'
complete -c snatd -n __fish_use_subcommand -a verify -d 'Send a datagram to each neighbour'
complete -c snatd -n __fish_use_subcommand -a explain -d 'Say who would rewrite the source of a packet'

complete -c snatd -n '__fish_seen_subcommand_from run check apply confirm status save revert flows verify explain' -l config -r -F -d 'Configuration file'
complete -c snatd -n '__fish_seen_subcommand_from check apply confirm status save revert flows verify explain' -l json -d 'One JSON object'
complete -c snatd -n '__fish_seen_subcommand_from apply' -l confirm -x -d 'Put everything back unless confirmed'
complete -c snatd -n '__fish_seen_subcommand_from status' -l watch -d 'Go on showing it, looking every so many seconds'
complete -c snatd -n '__fish_seen_subcommand_from save' -l dry-run -d 'Only show what would change'
complete -c snatd -n '__fish_seen_subcommand_from save' -l full -d 'Save all live rules'
complete -c snatd -n '__fish_seen_subcommand_from save' -l without-dynamic -d 'Leave out the chains of Docker, Kubernetes and CNI'
complete -c snatd -n '__fish_seen_subcommand_from flows' -l delete -x -a 'udp all' -d 'Delete these'
complete -c snatd -n '__fish_seen_subcommand_from explain' -l out -x -a '(command ls /sys/class/net)' -d 'Device it leaves by'
complete -c snatd -n '__fish_seen_subcommand_from explain' -l mark -x -d 'Its mark'
complete -c snatd -n '__fish_seen_subcommand_from explain' -l proto -x -a 'tcp udp icmp' -d 'Its protocol'
complete -c snatd -n '__fish_seen_subcommand_from explain' -l dport -x -d 'Destination port'
