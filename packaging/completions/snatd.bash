# Completion of snatd for bash. A test compares it with the program's own parser.

_snatd() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} options
    case $before in
        --config) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --delete) mapfile -t COMPREPLY < <(compgen -W "udp all" -- "$word"); return ;;
        --proto) mapfile -t COMPREPLY < <(compgen -W "tcp udp icmp" -- "$word"); return ;;
        --out) mapfile -t COMPREPLY < <(cd /sys/class/net && compgen -f -- "$word"); return ;;
        --confirm | --mark | --dport) return ;;
        --watch) [[ $word == -* ]] || return ;;
    esac
    if ((COMP_CWORD == 1)); then
        options="run check apply confirm status save revert flows verify explain doctor --help --version"
    else
        case ${COMP_WORDS[1]} in
            run) options="--help --config" ;;
            check | confirm | revert | verify | doctor) options="--help --config --json" ;;
            status) options="--help --config --json --watch" ;;
            apply) options="--help --config --json --confirm" ;;
            save) options="--help --config --json --dry-run --full --without-dynamic" ;;
            flows) options="--help --config --json --delete" ;;
            explain) options="--help --config --json --out --mark --proto --dport" ;;
            *) return ;;
        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
}
complete -o filenames -F _snatd snatd
