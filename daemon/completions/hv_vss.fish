# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_hv_vss_global_optspecs
    string join \n n/no-daemon device= c/config= h/help V/version
end

function __fish_hv_vss_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_hv_vss_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_hv_vss_using_subcommand
    set -l cmd (__fish_hv_vss_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c hv_vss -n "__fish_hv_vss_needs_command" -l device -d 'The device to serve' -r -F
complete -c hv_vss -n "__fish_hv_vss_needs_command" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_needs_command" -s n -l no-daemon -d 'Stay in the foreground and log to standard error'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -s V -l version -d 'Print version'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "run" -d 'Serve the host\'s requests (the default)'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "status" -d 'Show what the daemon is at and how the last backup went'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "history" -d 'Show the last backups: when, of what type, how they went, and why'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "check" -d 'Look at everything that a backup needs, short of freezing'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "list" -d 'Show what would be frozen, in which order, and what would not and why'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "freeze" -d 'Rehearse: call hooks, freeze as for a backup, wait, thaw'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "reload" -d 'Have the daemon that serves read its configuration again'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "thaw" -d 'Thaw what an unfinished freeze left frozen'
complete -c hv_vss -n "__fish_hv_vss_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand run" -l device -d 'The device to serve' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand run" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand run" -s n -l no-daemon -d 'Stay in the foreground and log to standard error'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand run" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand status" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand status" -l json -d 'Print JSON'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand status" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand history" -l svg -d 'Draw one backup as a timeline into FILE instead' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand history" -l number -d 'Which, counted from the last [default: 1]' -r
complete -c hv_vss -n "__fish_hv_vss_using_subcommand history" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand history" -l json -d 'Print JSON'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand history" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand check" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand check" -l json -d 'Print JSON'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand check" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand list" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand list" -l json -d 'Print JSON'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand list" -l table -d 'Print, as JSON, the mount tables and block devices that the plan is made from'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand list" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand freeze" -l for -d 'How long to stay frozen, such as 5s or 500ms' -r
complete -c hv_vss -n "__fish_hv_vss_using_subcommand freeze" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand freeze" -l no-hooks -d 'Call no hooks'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand freeze" -l json -d 'Print JSON'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand freeze" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand reload" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand reload" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand thaw" -l run-dir -d 'The folder with the record of whoever froze' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand thaw" -s c -l config -d 'The configuration [default: /etc/hv_vss/daemon.toml, if it exists]' -r -F
complete -c hv_vss -n "__fish_hv_vss_using_subcommand thaw" -s h -l help -d 'Print help'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "run" -d 'Serve the host\'s requests (the default)'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "status" -d 'Show what the daemon is at and how the last backup went'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "history" -d 'Show the last backups: when, of what type, how they went, and why'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "check" -d 'Look at everything that a backup needs, short of freezing'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "list" -d 'Show what would be frozen, in which order, and what would not and why'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "freeze" -d 'Rehearse: call hooks, freeze as for a backup, wait, thaw'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "reload" -d 'Have the daemon that serves read its configuration again'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "thaw" -d 'Thaw what an unfinished freeze left frozen'
complete -c hv_vss -n "__fish_hv_vss_using_subcommand help; and not __fish_seen_subcommand_from run status history check list freeze reload thaw help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
